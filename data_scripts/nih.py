"""Prepare NIH ChestX-ray14: python data_scripts/nih.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "nih", *sys.argv[1:]])
