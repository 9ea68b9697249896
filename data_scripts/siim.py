"""Prepare SIIM-ACR Pneumothorax: python data_scripts/siim.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "siim", *sys.argv[1:]])
