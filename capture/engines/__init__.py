"""Engines give units to workers, in this process, in processes of this machine, or in a Ray cluster.

`scheduler` decides, `drive` carries its decisions out on a pool of workers: `local` (this process),
`processes` or `ray`. `engine` picks the one that a capture's settings ask for.
"""
