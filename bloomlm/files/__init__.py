"""Files that appear complete or not at all (atomic.py), and results that a stopped run goes on from (resumable.py)."""
