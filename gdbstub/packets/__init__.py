"""What each packet does, one module a packet family; `table` lists them all."""
