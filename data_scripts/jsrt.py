"""Prepare JSRT with SCR masks: python data_scripts/jsrt.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "jsrt", *sys.argv[1:]])
