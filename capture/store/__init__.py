"""The store: one Zarr v3 group per capture, written unit by unit and safe to kill at any moment.

Import from the modules: `quantities` (the table of what can be captured), `layout` (make a store), `commit`
(write units), `lock` (one driver at a time), `verify`, `repair` and `reader`. A store lies where `place`
says: in a directory or an object store. Nothing here knows models or engines.
"""
