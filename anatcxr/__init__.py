"""PEAC and AFiRe for chest radiographs: every part explained in a notebook, exported and tested."""

__version__ = "0.1.0"
