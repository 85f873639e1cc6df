"""Taps listen to a model while it runs.

A tap is handed to the model, which calls it with every block's attention and residual add and with every loop
state. It derives from `Plain`, which keeps nothing:

- `models/tap.py` `Plain`: runs the operations, and is what a tap must offer.
- `models/interventions.py` `Interventions.around`: changes what the model does, around another tap.
- `statistics.py` `Statistics`: every quantity of a capture; `LastStates`: a first run that leaves behind what
  the last recurrence does. `distances.py` compares whole sequences for it, `state_stream.py` takes the states
  it keeps to disk.
- `maps.py` `Maps`: whole attention matrices of one short prompt.
- `frozen.py` `KeysValues`, `OthersFrozen`: a recurrence in which a token sees all others as they were.
"""
