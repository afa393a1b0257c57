"""From a run folder to answers: in Python, over HTTP, or as an exported file."""
