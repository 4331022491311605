"""The native core: host memory, windows, translation cache and emitted code that the engines share.

It runs guest instructions as host machine code; what an engine makes of an exit is the engine's business.
"""
