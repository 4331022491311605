"""The engines that run a guest: it knows `machine`, and nothing of debuggers."""
