//! The public items of terrace-client, as a list under version control: whoever
//! changes one sees it in the diff, and says so in the change log.
//!
//! The list is made of the sources: each `pub` item with its whole signature, but
//! not the variants of enums, nor what the client hands through from other crates. A
//! change that is meant is taken over by `TERRACE_BLESS=1 cargo test --release -p terrace-tests --test client_api`.

use std::fs;
use std::path::{Path, PathBuf};

const LIST: &str = "kvstore/client/public-api.txt";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

/// Public items of one file, each on a line, in order. What `pub(crate)` names is not public.
fn items(text: &str) -> Vec<String> {
    // Tests come last in a file.
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let mut lines = text.lines().map(str::trim);
    let mut found = Vec::new();
    let mut owner = String::new();
    while let Some(line) = lines.next() {
        let impl_of = line.starts_with("impl ") || line.starts_with("impl<");
        if !impl_of && !line.starts_with("pub ") {
            continue;
        }
        let mut whole = line.to_owned();
        while !whole.contains(['{', ';']) && !whole.ends_with(',') {
            let Some(next) = lines.next() else { break };
            whole = format!("{whole} {next}");
            if next.starts_with(')') && next.contains(['{', ';']) {
                break;
            }
        }
        while whole.matches('(').count() > whole.matches(')').count()
            || (whole.starts_with("pub use") && !whole.ends_with(';'))
        {
            let Some(next) = lines.next() else { break };
            whole = format!("{whole} {next}");
        }
        if !whole.starts_with("pub use") {
            whole = whole.split('{').next().unwrap_or_default().trim().to_owned();
        }
        if impl_of {
            owner = whole;
            continue;
        }
        let inside = whole.starts_with("pub fn") || whole.starts_with("pub async fn");
        found.push(if inside && !owner.is_empty() { format!("{owner}: {whole}") } else { whole });
        // Free items come before the first impl or after a type of their own.
        if ["pub struct", "pub enum", "pub mod"].iter().any(|kind| found[found.len() - 1].starts_with(kind)) {
            owner.clear();
        }
    }
    found
}

fn list() -> String {
    let folder = root().join("kvstore/client/src");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .expect("the client's sources")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut text = String::new();
    for file in files {
        let source = fs::read_to_string(&file).expect("a source is text");
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for item in items(&source) {
            text.push_str(&format!("{name}: {item}\n"));
        }
    }
    text
}

/// A signature that changes unseen breaks those who link the client.
#[test]
fn the_public_items_are_those_of_the_list() {
    let (path, found) = (root().join(LIST), list());
    if std::env::var_os("TERRACE_BLESS").is_some() {
        fs::write(&path, &found).expect("the list can be written");
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let gone: Vec<&str> = kept.lines().filter(|line| !found.lines().any(|other| other == *line)).collect();
    let new: Vec<&str> = found.lines().filter(|line| !kept.lines().any(|other| other == *line)).collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "terrace-client's public items changed; if that is meant, run this test with TERRACE_BLESS=1 and say it in \
         CHANGELOG.md\ngone:\n  {}\nnew:\n  {}",
        gone.join("\n  "),
        new.join("\n  ")
    );
}

/// A list that leaves items out protects nothing.
#[test]
fn signatures_are_listed_whole() {
    let text = "pub(crate) fn no() {}\npub struct A {\n    pub b: u32,\n    c: u32,\n}\nimpl A {\n    pub async fn d(\n        \
                &self,\n        e: u32,\n    ) -> Result<u32, F> {\n    }\n    fn g() {}\n}\n#[cfg(test)]\npub fn h() {}\n";
    assert_eq!(
        items(text),
        ["pub struct A", "pub b: u32,", "impl A: pub async fn d( &self, e: u32, ) -> Result<u32, F>"]
    );
}
