"""Protected-mode cases that the same guest runs under any engine, compared with other emulators of the processor."""
