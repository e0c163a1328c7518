"""How thread blocks share the work of a layer, and pass values to each other: see `config`, `polling`, `reductions`."""
