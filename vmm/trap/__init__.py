"""`trap`: the hardware-style VMM. Guest mode is entered through a control block, and left by exits."""
