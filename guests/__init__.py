"""Guest kernels of our own: their sources, and the images built from them that ship with the package."""
