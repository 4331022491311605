"""How a debugger talks to a machine: the remote protocol, its server, monitor commands and the command line."""
