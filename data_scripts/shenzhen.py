"""Prepare NLM Shenzhen: python data_scripts/shenzhen.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "shenzhen", *sys.argv[1:]])
