"""The BIOS ROM: assembler source, and the image built from it."""
