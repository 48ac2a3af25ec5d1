"""The wall between the daemon and the process that trains: commands as data, one shared memory."""
