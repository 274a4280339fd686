//! A real node in a temporary directory: `terrace up` and everything it starts.
//!
//! Dropped, it is killed; its children die with it.

#![allow(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking; these functions are for tests alone"
)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Longest wait for anything.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// Path of one of our programs: they lie two folders above the test.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a running test has a path");
    let path = own.ancestors().nth(2).expect("tests run from target/release/deps").join(name);
    assert!(path.is_file(), "{} is missing: cargo build --release --workspace --bins", path.display());
    path
}

/// The default model, if it was fetched; else says how and that the test is skipped.
pub fn model() -> Option<PathBuf> {
    let cache = std::env::var_os("TERRACE_CACHE")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/terrace")))?;
    let path = cache.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.is_file() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is missing; `terrace model fetch` gets it", path.display());
    None
}

/// Calls `done` until it is true.
pub fn wait_until(mut done: impl FnMut() -> bool, what: &str) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < DEADLINE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a signal, for example `-KILL`, by the `kill` program.
pub fn kill(pid: u32, signal: &str) {
    Command::new("kill").args([signal, &pid.to_string()]).status().expect("there is a kill program");
}

/// Whether a process runs (a zombie does not).
pub fn alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(_, state)| state != 'Z')
}

fn stat(pid: u32) -> Option<(u32, char)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut rest = text.rsplit_once(") ")?.1.split(' ');
    let state = rest.next()?.chars().next()?;
    Some((rest.next()?.parse().ok()?, state))
}

/// `terrace` with arguments, away from the user's own settings.
pub fn terrace(args: &[&str]) -> Command {
    let mut command = Command::new(program("terrace"));
    command.args(args).env_remove("TERRACE_HOME").env_remove("TERRACE_ENDPOINT").stdin(Stdio::null());
    command
}

/// A running node.
pub struct Node {
    up: Child,
    /// Its state directory.
    pub home: PathBuf,
    /// Address of the front door, `http://127.0.0.1:N`.
    pub url: String,
    /// What `terrace up` printed until it was ready.
    pub said: Vec<String>,
    _dir: Option<TempDir>,
}

impl Node {
    /// Starts one with a small pool and data file in a directory of its own.
    pub fn start(model: &Path, extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut node = Self::start_in(&dir.path().join("home"), model, extra);
        node._dir = Some(dir);
        node
    }

    /// Starts one in `home`, which stays.
    pub fn start_in(home: &Path, model: &Path, extra: &[&str]) -> Self {
        let mut command =
            terrace(&["up", "--port", "0", "--pinned-bytes", "512MiB", "--nvme-bytes", "512MiB"]);
        command.arg("--home").arg(home).arg("--model").arg(model).args(extra);
        let mut up = command.stdout(Stdio::piped()).spawn().expect("terrace up starts");
        let mut lines = BufReader::new(up.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut said: Vec<String> = Vec::new();
        while !said.last().is_some_and(|line| line.starts_with("ready: ")) {
            match lines.next() {
                Some(line) => said.push(line),
                None => panic!("terrace up did not get ready:\n{}\n{}", said.join("\n"), logs(home)),
            }
        }
        std::thread::spawn(move || lines.for_each(|line| eprintln!("up: {line}")));
        let url = said.last().unwrap().trim_start_matches("ready: ").to_owned();
        Self { up, home: home.to_owned(), url, said, _dir: None }
    }

    /// Process id of `terrace up`.
    pub fn pid(&self) -> u32 {
        self.up.id()
    }

    /// The processes below `terrace up`, as pid and program name.
    pub fn children(&self) -> Vec<(u32, String)> {
        let mut parents = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().map_while(Result::ok) {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            parents.extend(stat(pid).map(|(parent, _)| (pid, parent)));
        }
        let mut found = vec![self.pid()];
        let mut next = 0;
        while next < found.len() {
            let parent = found[next];
            found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
            next += 1;
        }
        let name = |pid: &u32| {
            let target = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            (*pid, target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
        };
        found[1..].iter().map(name).collect()
    }

    /// Process id of the first child that runs this program.
    pub fn child(&self, name: &str) -> u32 {
        let found = self.children().into_iter().find(|(_, program)| program == name);
        found.unwrap_or_else(|| panic!("no {name} among {:?}", self.children())).0
    }

    /// An admin command against this node.
    pub fn admin(&self, args: &[&str]) -> Output {
        let mut command = terrace(args);
        command.arg("--home").arg(&self.home).output().expect("terrace runs")
    }

    /// The JSON of an admin command that must succeed.
    pub fn admin_json(&self, args: &[&str]) -> Value {
        let output = self.admin(&[args, &["-o", "json"]].concat());
        let (text, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{args:?}: {errors}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error} in {text}"))
    }

    /// What the addresses file says.
    pub fn running(&self) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.home.join("terrace.json")).unwrap()).unwrap()
    }

    /// Waits for `terrace up` to end; answers its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let mut code = None;
        let up = &mut self.up;
        wait_until(
            || up.try_wait().unwrap().map(|status| code = status.code()).is_some(),
            "the end of terrace up",
        );
        code
    }

    /// kill -9 of every process; returns when all are gone.
    pub fn kill_everything(mut self) {
        let pids: Vec<u32> = self.children().into_iter().map(|(pid, _)| pid).collect();
        pids.iter().chain([&self.up.id()]).for_each(|pid| kill(*pid, "-KILL"));
        self.up.wait().unwrap();
        wait_until(|| !pids.iter().any(|pid| alive(*pid)), "the death of every process");
    }

    /// The ends of all log files.
    pub fn logs(&self) -> String {
        logs(&self.home)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        // Its children die with it.
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}

fn logs(home: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(home.join("logs")).into_iter().flatten().map_while(Result::ok) {
        let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(30)..];
        text.push_str(&format!("--- {}\n{}\n", entry.path().display(), tail.join("\n")));
    }
    text
}
