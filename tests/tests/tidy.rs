//! House rules that neither the compiler nor clippy checks.
//!
//! Each rule is a test; its message names file, line and what to write instead. A file that broke a rule
//! before the rule existed stands in [`OLD_OFFENDERS`]. That list only shrinks: an entry whose file is
//! clean fails the test until it is removed.

use std::fs;
use std::path::{Path, PathBuf};

const LINES_MAX: usize = 800;

/// Where the job needs `unsafe`: device memory, shared memory, rings, vector kernels, Python's buffers.
const UNSAFE_FOLDERS: &[&str] = &[
    "gpudirect/",
    "kvstore/media/",
    "kvstore/lane/",
    "worker/src/kernels",
    "worker/python/src/block.rs",
    "worker/python/src/dlpack.rs",
    "worker/python/src/span.rs",
];

/// Rule and file, for files older than the rule.
const OLD_OFFENDERS: &[(&str, &str)] = &[];

/// One line that breaks a rule.
struct Offence {
    file: String,
    line: usize,
    advice: String,
}

/// A text file of the repository, by its path from the root.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_test(&self) -> bool {
        self.path.contains("tests/") || self.path.ends_with("/tests.rs")
    }

    fn offence(&self, index: usize, advice: impl Into<String>) -> Offence {
        Offence { file: self.path.clone(), line: index + 1, advice: advice.into() }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

/// Every text file that we wrote. Build products (`target`, and what carries a CACHEDIR.TAG) and hidden state are left out;
/// `.git` is a file where the checkout is a worktree.
fn sources() -> Vec<Source> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository can be read") {
            let path = entry.expect("an entry of the repository can be read").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                let ours = !name.starts_with('.') || name == ".cargo" || name == ".ci";
                if ours && name != "node_modules" && name != "target" && !path.join("CACHEDIR.TAG").exists() {
                    folders.push(path);
                }
            } else if name != "Cargo.lock" && name != "LICENSE" && name != ".git" {
                let Ok(text) = fs::read_to_string(&path) else { continue };
                let path = path.strip_prefix(&root).expect("found below the root");
                found.push(Source { path: path.to_string_lossy().into_owned(), text });
            }
        }
    }
    assert!(found.iter().any(|source| source.path == "Cargo.toml"), "the walk starts at the root");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Fails with every offence that is not excused, and with every excuse that nobody needs.
fn enforce(rule: &str, check: impl Fn(&Source) -> Vec<Offence>) {
    let offences: Vec<Offence> = sources().iter().flat_map(check).collect();
    let excused = |file: &str| OLD_OFFENDERS.contains(&(rule, file));
    let mut report: Vec<String> = offences
        .iter()
        .filter(|offence| !excused(&offence.file))
        .map(|offence| format!("{}:{}: {}", offence.file, offence.line, offence.advice))
        .collect();
    for (_, file) in OLD_OFFENDERS.iter().filter(|(of, _)| *of == rule) {
        if !offences.iter().any(|offence| offence.file == *file) {
            report.push(format!("{file} is clean now: remove it from OLD_OFFENDERS ({rule})"));
        }
    }
    assert!(report.is_empty(), "{rule}:\n{}", report.join("\n"));
}

/// Rust text with comments and the insides of literals blanked out, line breaks kept.
fn code_of(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = literal_end(bytes, at);
        if end > at {
            code.extend(bytes[at..end].iter().map(|byte| if *byte == b'\n' { b'\n' } else { b' ' }));
            at = end;
        } else {
            code.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// Where the comment, string or character that starts at `at` ends; `at` itself if none starts there.
fn literal_end(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    let after_word = at > 0 && is_word(bytes[at - 1]);
    if rest.starts_with(b"//") {
        return at + rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
    }
    if rest.starts_with(b"/*") {
        return at + find(rest, b"*/").map_or(rest.len(), |index| index + 2);
    }
    if rest.starts_with(b"\"") {
        return quoted_end(bytes, at, b'"');
    }
    if rest[0] == b'r' && (!after_word || bytes[at - 1] == b'b') {
        let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
        if rest.get(1 + hashes) == Some(&b'"') {
            let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
            let body = 2 + hashes;
            return at + find(&rest[body..], &close).map_or(rest.len(), |index| body + index + close.len());
        }
    }
    // A lifetime has no closing quote within the next few bytes.
    if rest[0] == b'\'' && (rest.get(1) == Some(&b'\\') || rest.get(2) == Some(&b'\'')) {
        return quoted_end(bytes, at, b'\'');
    }
    at
}

fn quoted_end(bytes: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

fn header_rule(source: &Source) -> Vec<Offence> {
    let opens_well = !source.is_rust() || source.text.starts_with("//! ");
    if opens_well { Vec::new() } else { vec![source.offence(0, "open with `//!`: what the file is for")] }
}

fn length_rule(source: &Source) -> Vec<Offence> {
    let count = source.text.lines().count();
    if !source.is_rust() || count <= LINES_MAX {
        return Vec::new();
    }
    let advice = format!("{count} lines, {LINES_MAX} is the limit: split by responsibility");
    vec![source.offence(LINES_MAX, advice)]
}

fn ascii_rule(source: &Source) -> Vec<Offence> {
    let checked = [".rs", ".proto", ".toml", ".yaml", ".sh"].iter().any(|end| source.path.ends_with(end));
    let lines = source.text.lines().enumerate().filter(|(_, line)| checked && !line.is_ascii());
    lines.map(|(index, _)| source.offence(index, "write it in ASCII, or as an escape")).collect()
}

fn leftover_rule(source: &Source) -> Vec<Offence> {
    let banned = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let lines = source.text.lines().enumerate();
    lines
        .filter(|(_, line)| words(line).any(|word| banned.contains(&word)))
        .map(|(index, _)| source.offence(index, "finish it, or file it where plans live"))
        .collect()
}

fn machine_path_rule(source: &Source) -> Vec<Offence> {
    let banned =
        [concat!("/wo", "rk/"), concat!("/tmp/", "spec"), concat!("/ro", "ot/"), concat!("/ho", "me/")];
    let lines = source.text.lines().enumerate();
    lines
        .filter(|(_, line)| banned.iter().any(|path| starts_path(line, path)))
        .map(|(index, _)| source.offence(index, "a path of one machine; take it from the environment"))
        .collect()
}

/// Whether `line` names `path` from the root of the file system, and not as a part of a longer path.
fn starts_path(line: &str, path: &str) -> bool {
    let before = |at: usize| at.checked_sub(1).map(|before| line.as_bytes()[before]);
    line.match_indices(path).any(|(at, _)| before(at).is_none_or(|byte| !is_word(byte) && byte != b'.'))
}

fn unsafe_rule(source: &Source) -> Vec<Offence> {
    if !source.is_rust() || UNSAFE_FOLDERS.iter().any(|folder| source.path.starts_with(folder)) {
        return Vec::new();
    }
    let code = code_of(&source.text);
    let lines = code.lines().enumerate().filter(|(_, line)| words(line).any(|word| word == "unsafe"));
    lines
        .map(|(index, _)| source.offence(index, format!("unsafe lives in {UNSAFE_FOLDERS:?} only")))
        .collect()
}

fn word_rule(source: &Source) -> Vec<Offence> {
    if !source.is_rust() {
        return Vec::new();
    }
    let mut offences = Vec::new();
    for (index, line) in code_of(&source.text).lines().enumerate() {
        let mut previous = "";
        for word in words(line) {
            if let Some(advice) = word_advice(previous, word) {
                offences.push(source.offence(index, format!("`{word}`: {advice}")));
            }
            previous = word;
        }
    }
    offences
}

/// What to write instead of `word`, which follows `previous`.
fn word_advice(previous: &str, word: &str) -> Option<&'static str> {
    let names_type = ["struct", "enum", "trait", "type", "union"].contains(&previous);
    let names_thing = names_type || ["fn", "mod", "let", "mut"].contains(&previous);
    if names_type && ["Manager", "Helper", "Util"].iter().any(|part| word.contains(part)) {
        return Some("name it for what it does");
    }
    if previous == "fn" && word.starts_with("get_") {
        return Some("no get_: the noun alone says it");
    }
    if previous == "mod" && ["utils", "util", "helpers", "helper", "misc"].contains(&word) {
        return Some("name the module for what it holds");
    }
    if names_thing && ["src", "dst"].contains(&word) {
        return Some("source and target");
    }
    None
}

/// A prelude exists for its glob; vector intrinsics come by the dozen, and their prefix says where from.
fn glob_rule(source: &Source) -> Vec<Offence> {
    if !source.is_rust() || source.is_test() {
        return Vec::new();
    }
    let code = code_of(&source.text);
    let outside_tests = code.split("#[cfg(test)]").next().unwrap_or_default();
    let imports = outside_tests.lines().enumerate().filter(|(_, line)| {
        let line = line.trim_start();
        let imports = line.starts_with("use ") || line.starts_with("pub use ");
        imports && line.contains("::*") && !line.contains("::arch::") && !line.contains("::prelude::*")
    });
    imports.map(|(index, _)| source.offence(index, "import by name")).collect()
}

/// A workspace of its own (a peer that is measured, and that CI does not build) names its versions itself.
fn dependency_rule(source: &Source) -> Vec<Offence> {
    if !source.path.ends_with("/Cargo.toml") || source.text.lines().any(|line| line == "[workspace]") {
        return Vec::new();
    }
    let mut offences = Vec::new();
    let mut in_dependencies = false;
    for (index, line) in source.text.lines().enumerate() {
        if line.starts_with('[') {
            in_dependencies = line.trim_end_matches(']').ends_with("dependencies");
        } else if in_dependencies && line.contains('=') && !line.contains("workspace = true") {
            offences
                .push(source.offence(index, "`name.workspace = true`; versions live in the root Cargo.toml"));
        }
    }
    offences
}

/// A reader opens a file and cannot tell what it is for: every source file must say so at its top.
#[test]
fn every_file_says_what_it_is_for() {
    enforce("header", header_rule);
}

/// Files grow one function at a time until nobody can hold them in mind: the limit is hard.
#[test]
fn files_stay_short() {
    enforce("length", length_rule);
}

/// A look-alike character hides in a source and changes its meaning unseen: sources are ASCII.
#[test]
fn sources_are_ascii() {
    enforce("ascii", ascii_rule);
}

/// A note to finish something later is forgotten in the code: none may be committed.
#[test]
fn nothing_is_left_for_later() {
    enforce("leftover", leftover_rule);
}

/// A path of the author's machine works there only: none may stand in the repository.
#[test]
fn no_path_of_one_machine() {
    enforce("machine path", machine_path_rule);
}

/// Unsafe code spreads to where nobody reviews it as such: it stays in the folders whose job needs it.
#[test]
fn unsafe_stays_where_it_belongs() {
    enforce("unsafe", unsafe_rule);
}

/// Two words for one thing make two things of it: the vocabulary is fixed.
#[test]
fn words_mean_one_thing() {
    enforce("words", word_rule);
}

/// A glob import hides where a name comes from: only tests may use one.
#[test]
fn imports_are_by_name() {
    enforce("globs", glob_rule);
}

/// Two crates ask for two versions of one dependency: every version is named once, in the workspace.
#[test]
fn versions_live_in_the_workspace() {
    enforce("dependencies", dependency_rule);
}

/// A rule that never fires guards nothing: each must catch a sample that breaks it, and pass one that does not.
#[test]
fn each_rule_catches_its_sample() {
    let caught = |rule: fn(&Source) -> Vec<Offence>, path: &str, text: &str| {
        !rule(&Source { path: path.into(), text: text.into() }).is_empty()
    };
    assert!(caught(header_rule, "a.rs", "use std::fs;\n"));
    assert!(caught(length_rule, "a.rs", &"\n".repeat(LINES_MAX + 1)));
    assert!(caught(ascii_rule, "a.rs", "let \u{3b1} = 1;\n"));
    assert!(caught(leftover_rule, "a.md", concat!("TO", "DO: later\n")));
    assert!(caught(machine_path_rule, "a.md", concat!("cd /wo", "rk/x\n")));
    assert!(!caught(machine_path_rule, "a.md", concat!("see ./wo", "rk/x\n")));
    assert!(caught(unsafe_rule, "router/src/lib.rs", "let x = unsafe { *p };\n"));
    assert!(!caught(unsafe_rule, "gpudirect/src/lib.rs", "let x = unsafe { *p };\n"));
    assert!(!caught(unsafe_rule, "router/src/lib.rs", "// unsafe\nlet x = \"unsafe\"; /* unsafe */\n"));
    assert!(caught(word_rule, "a.rs", "struct LeaseManager;\n"));
    assert!(caught(word_rule, "a.rs", "pub fn get_block() {}\n"));
    assert!(!caught(word_rule, "a.rs", "let text = \"struct LeaseManager\";\n"));
    assert!(caught(glob_rule, "a.rs", "use std::io::*;\n"));
    assert!(!caught(glob_rule, "a.rs", "#[cfg(test)]\nmod tests { use super::*; }\n"));
    assert!(caught(dependency_rule, "x/Cargo.toml", "[dependencies]\nlibc = \"0.2\"\n"));
    assert!(!caught(dependency_rule, "x/Cargo.toml", "[dependencies]\nlibc.workspace = true\n"));
    assert!(!caught(dependency_rule, "x/Cargo.toml", "[workspace]\n[dependencies]\nlibc = \"0.2\"\n"));
}

/// The blanking of literals slips by one quote and hides code from every rule: the hard literals, one by one.
#[test]
fn literals_are_blanked_and_code_is_kept() {
    assert_eq!(code_of("a\"b\\\"c\"d"), "a      d");
    assert_eq!(code_of("r#\"x\"y\"#z"), "        z");
    assert_eq!(code_of("'\"' + x"), "    + x");
    assert_eq!(code_of("&'a str"), "&'a str");
    assert_eq!(code_of("'\\'' y"), "     y");
    assert_eq!(code_of("x // y\nz"), "x     \nz");
    assert_eq!(code_of("var\"s\""), "var   ");
}
