"""`report.html` of a run: one file with its options, results, curves, adapters and examples."""
