"""Prepare ChildCXR (Kermany et al.): python data_scripts/kermany.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "kermany", *sys.argv[1:]])
