"""Reads stores, asks what is in them, and shows it.

One word for one thing, from the store up:

- **measure**: one curve over depth, such as the relative step (`measures.py`). It is asked as an analysis.
- **analysis**: one question to a store: what it needs, and a fold that takes in one sequence after another
  (`Analysis`, in `walk.py`, which puts all of them through one reading). `answers/` has a file for each
  subject, with its analyses and the functions that ask them; `registry.py` has all but the measures by name.
- **answer**: what an analysis gives: a Dataset, or why there is none, as text (`CannotTellError` carries it).
- **verdict**: a yes, a no or "cannot tell", from measures and answers against a threshold (`verdicts.py`).
- **findings**: all that was found in one capture, or in one of its loops: measures, answers and verdicts,
  under a label (`findings.py`). Figures and pages are drawn from findings, and `analyze.py` writes
  tables and figures of them.
"""
