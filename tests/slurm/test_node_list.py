"""SLURM's lists of host names are read as scontrol reads them, and written so that they read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.node_list import compress, expand


@pytest.mark.parametrize(
    ("node_list", "names"),
    [
        # Each as `scontrol show hostnames` of SLURM 22.05 prints it.
        ("", []),
        ("host", ["host"]),
        ("n[3,1]", ["n3", "n1"]),
        ("n[1-3,7],login", ["n1", "n2", "n3", "n7", "login"]),
        ("jwb[0098-0101]", ["jwb0098", "jwb0099", "jwb0100", "jwb0101"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[1-03]", ["n1", "n2", "n3"]),
        ("m[01-02]x[1-2]", ["m01x1", "m01x2", "m02x1", "m02x2"]),
        ("n[1-2]-ib[0-1]", ["n1-ib0", "n1-ib1", "n2-ib0", "n2-ib1"]),
        ("n[1-2][3-4]", ["n13", "n14", "n23", "n24"]),
        ("[1-3]", ["1", "2", "3"]),
        ("a,,b,", ["a", "b"]),
        ("n[1-2],n[2-3]", ["n1", "n2", "n2", "n3"]),
        ("a.example.org, b-1.example.org", ["a.example.org", "b-1.example.org"]),
        # Newer releases allow a suffix.
        ("n[1-2]i", ["n1i", "n2i"]),
    ],
)
def test_a_list_is_expanded_as_scontrol_does(node_list, names):
    assert expand(node_list) == names


@pytest.mark.parametrize(
    ("node_list", "message"),
    [
        ("n[1-3", r"'n\[1-3': a '\[' is not closed; was the list cut off"),
        ("n1]", r"'\]' at character 3 has no counterpart"),
        ("n[[1]]", r"'\[' at character 3 has no counterpart"),
        ("n[]", "'' in brackets is neither a number nor a range such as 01-16"),
        ("n[1,]", "'' in brackets is neither"),
        ("n[1-a]", "'1-a' in brackets is neither"),
        ("n[ 1-2]", "' 1-2' in brackets is neither"),
        ("n[3-1]", "the range 3-1 runs backwards"),
        ("n[0-99999]", "100000 names in 0-99999, SLURM's largest range is 65536"),
        ("a b", "a space within the name 'a b'"),
    ],
)
def test_what_is_no_list_is_refused_with_the_place(node_list, message):
    with pytest.raises(ValueError, match=message):
        expand(node_list)


@pytest.mark.parametrize(
    ("names", "node_list"),
    [
        ([], ""),
        (["b", "a"], "a,b"),
        (["n3", "n1", "n2", "n7", "n2"], "n[1-3,7]"),
        (["n08", "n09", "n10", "n3"], "n[3,08-10]"),
        (["n99", "n100"], "n[99-100]"),
        (["n1", "n01", "n2"], "n[1-2,01]"),
        (["n", "n1", "n2"], "n,n[1-2]"),
        (["n1", "m1"], "m1,n1"),
        (["n1i", "n2i"], "n1i,n2i"),
    ],
)
def test_names_are_written_as_ranges(names, node_list):
    assert compress(names) == node_list


@pytest.mark.parametrize("name", ["", "n[1]", "a,b", "a b"])
def test_a_name_that_cannot_stand_in_a_list_is_refused(name):
    with pytest.raises(ValueError, match="is not a host name: it is empty, or has a bracket, a comma or a space"):
        compress([name])


@given(st.lists(st.from_regex(r"[a-z]{0,2}[0-9]{0,3}[a-z]?[0-9]{0,3}", fullmatch=True).filter(bool)))
def test_what_is_written_reads_back_as_the_same_names(names):
    assert sorted(expand(compress(names))) == sorted(set(names))
