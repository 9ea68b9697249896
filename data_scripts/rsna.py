"""Prepare RSNA Pneumonia Detection Challenge 2018: python data_scripts/rsna.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "rsna", *sys.argv[1:]])
