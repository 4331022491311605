"""The devices of the PC, one a module; `board` puts them together."""
