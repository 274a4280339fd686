//! Programs and tests are built from the same crates, so that `make up` after `make test` compiles nothing again.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// Crates with their features, as cargo resolves them for these kinds of dependencies.
fn resolved(kinds: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let format = ["--prefix", "none", "--format", "{p} {f}"];
    let output = Command::new(cargo)
        .args(["tree", "--offline", "--locked", "--workspace", "-e", kinds])
        .args(format)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository"))
        .output()
        .expect("cargo runs, it built this test");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree failed:\n{errors}");
    let tree = String::from_utf8_lossy(&output.stdout);
    tree.lines().map(|line| line.trim_end_matches("(*)").trim_end().to_owned()).collect()
}

/// A crate that only tests need asks for a feature of one that everything is built from: each has then two builds, and
/// whoever changes from running to testing waits for the other. The feature is to be named in the root `Cargo.toml`.
#[test]
fn tests_ask_for_no_features_that_programs_lack() {
    let (programs, tests) = (resolved("normal,build"), resolved("normal,build,dev"));
    assert!(programs.iter().any(|line| line.starts_with("serde v")), "{programs:?}");
    let twice: Vec<_> = programs.difference(&tests).collect();
    assert!(twice.is_empty(), "built once more for tests: {twice:#?}");
}
