"""Prepare PneumoniaMNIST: python data_scripts/pneumoniamnist.py --dst FOLDER [--dry-run] [--help]

It is downloaded where the network allows; a publisher's file in DST/download is used as it is.
"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "pneumoniamnist", *sys.argv[1:]])
