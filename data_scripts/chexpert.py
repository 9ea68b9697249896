"""Prepare CheXpert: python data_scripts/chexpert.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "chexpert", *sys.argv[1:]])
