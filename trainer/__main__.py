"""`python -m trainer …` is `lenvm …`: launchers of many processes take a module."""

from importlib.metadata import entry_points

if __name__ == "__main__":
    (script,) = entry_points(group="console_scripts", name="lenvm")
    script.load()()
