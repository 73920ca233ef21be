"""The subjects: operators and modules, a file or a folder each. `harness.judge.protocols` lists their members."""
