"""Prepare your own images in folders by class: python data_scripts/folder.py --src DOWNLOAD --dst FOLDER [--dry-run] [--help]"""
import sys

from anatcxr.cli import command_line

if __name__ == "__main__": command_line(["prepare", "folder", *sys.argv[1:]])
