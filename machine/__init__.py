"""The guest's machine: CPU state and semantics, memory, devices, clock and loaders.

Nothing here knows how the guest is run (`vmm`) or who debugs it (`gdbstub`).
"""
