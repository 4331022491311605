"""Other CPUs that tests compare the reference machine with: this host's, and Unicorn's."""
