"""Prepare NLM Montgomery: python data_scripts/montgomery.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "montgomery", *sys.argv[1:]])
