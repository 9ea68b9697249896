"""Prepare MIMIC-CXR-JPG: python data_scripts/mimic.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "mimic", *sys.argv[1:]])
