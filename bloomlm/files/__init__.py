"""Files that appear complete or not at all (atomic.py), and results that survive a stopped run (resumable.py)."""
