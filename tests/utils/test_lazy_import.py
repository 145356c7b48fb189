"""Names are imported when they are used; a module is imported right after another one."""

import subprocess
import sys
import textwrap

import pytest

FILES = {
    "lazypackage/__init__.py": """
        from kdtoolkit.utils.lazy_import import lazy_attributes

        __getattr__, __dir__ = lazy_attributes(
            __name__,
            {"Thing": "lazypackage.things", "things": "lazypackage.things"},
            {"Old": ("Thing", "lazypackage.things"), "stuff": ("things", "lazypackage.things")},
        )
    """,
    "lazypackage/things.py": "class Thing: ...",
    "waited.py": "value = 1",
    "after.py": "import sys; value_seen = sys.modules['waited'].value",
}


@pytest.fixture
def run(tmp_path):
    """Run code in a process of its own, beside the files."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def run_code(code):
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_code


def test_a_public_name_is_imported_when_it_is_used(run):
    run("""
        import sys, lazypackage
        assert "lazypackage.things" not in sys.modules
        assert "Thing" in dir(lazypackage) and "Old" not in dir(lazypackage)
        assert lazypackage.Thing is sys.modules["lazypackage.things"].Thing
        assert "Thing" in vars(lazypackage)  # kept for the next use
        assert lazypackage.things is sys.modules["lazypackage.things"]
        from lazypackage import Thing
    """)


def test_an_unknown_name_is_an_attribute_error(run):
    run("""
        import lazypackage
        try:
            lazypackage.Nothing
        except AttributeError as error:
            assert str(error) == "module 'lazypackage' has no attribute 'Nothing'"
        assert not hasattr(lazypackage, "Nothing")
    """)


def test_an_old_name_warns_every_time_where_it_is_used(run):
    run("""
        import warnings, lazypackage
        for old, new in (("Old", "lazypackage.things.Thing"), ("stuff", "lazypackage.things")):
            for _ in range(2):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    found = getattr(lazypackage, old)
                (warning,) = caught
                assert warning.category is DeprecationWarning and warning.filename == "<string>"
                assert f"lazypackage.{old} is now {new};" in str(warning.message)
        assert lazypackage.Thing is lazypackage.things.Thing
    """)


def test_a_module_is_imported_right_after_another(run):
    run("""
        import sys
        from kdtoolkit.utils.lazy_import import import_after
        finders = len(sys.meta_path)
        import_after("never_imported", "after")
        import_after("waited", "after")
        assert "after" not in sys.modules and len(sys.meta_path) == finders + 2
        import waited
        assert sys.modules["after"].value_seen == 1 and len(sys.meta_path) == finders + 1
        assert type(waited.__spec__.loader).__module__ != "kdtoolkit.utils.lazy_import"
        assert waited.__loader__ is waited.__spec__.loader
    """)


def test_a_module_that_is_there_already_imports_the_other_now(run):
    run("""
        import sys, waited
        from kdtoolkit.utils.lazy_import import import_after
        finders = len(sys.meta_path)
        import_after("waited", "after")
        assert "after" in sys.modules and len(sys.meta_path) == finders
    """)


def test_a_module_that_does_not_exist_stays_missing(run):
    run("""
        import importlib.util, sys
        from kdtoolkit.utils.lazy_import import import_after
        import_after("no_such_module", "after")
        assert importlib.util.find_spec("no_such_module") is None
        try:
            import no_such_module
        except ModuleNotFoundError:
            pass
        assert "after" not in sys.modules
    """)


def test_the_package_imports_neither_torch_nor_timm_until_they_are_used(run):
    run("""
        import sys, kdtoolkit
        assert not {"torch", "timm", "accelerate"} & set(sys.modules)
        assert "distill" in dir(kdtoolkit)
        assert kdtoolkit.schedules.Linear(1.0, 0.0) == kdtoolkit.schedules.Linear(1.0, 0.0)
        assert "torch" not in sys.modules
    """)


def test_networks_are_registered_once_timm_is_imported(run):
    run("""
        import warnings
        warnings.simplefilter("ignore")
        import kdtoolkit, timm
        assert timm.is_model("cifar_resnet20")
    """)
