"""One writer per file, resumable: chunks, statistics, the ledger of what is done, and the rename that publishes.

Decoded fields come in; a dataset that is complete, or not there, goes out.
"""
