"""Coverage: for every architecture, whether its attentions are found and whether sharing their maps is exact.

    python -m benchmarks.coverage                 # runs what is missing; writes its results and docs/coverage.md
    python -m benchmarks.coverage --only Gemma    # the rows whose name matches, again
    python -m benchmarks.coverage --fresh         # everything again
    python -m benchmarks.coverage --list          # names, families and expected attentions

`rows.py` collects the architectures from the `rows_*.py`, each with the number of attentions that its definition says;
`check.py` runs one of them; `runner.py` runs many, each in a process of its own; `page.py` makes the document.
"""
