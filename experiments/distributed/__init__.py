"""Programs on several devices and in several processes: the mesh of a config, the processes, the launcher of each."""
