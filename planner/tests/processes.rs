//! The real planner with real child processes. A small script stands where the
//! worker program would, because only starting, stopping and dying are looked at.
#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking; the lint's exception covers test functions only"
)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for something that should happen at once.
const DEADLINE: Duration = Duration::from_secs(20);

struct Planner {
    process: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
    dir: tempfile::TempDir,
}

impl Planner {
    /// Two prefill workers and one decode worker, no daemon. Each worker leaves
    /// its pid in a file and `drained` behind when it was asked to stop.
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("worker");
        let text = format!(
            "#!/bin/bash\nshift; name=$2\ncd {}\ntrap 'touch $name.drained; exit 0' TERM\necho $$ > $name.part\nmv $name.part $name.pid\n\
             echo started $name >&2\nwhile true; do sleep 0.05; done\n",
            dir.path().display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_terrace-planner"))
            .args(["--grpc", "http://127.0.0.1:9", "--metrics-listen", "127.0.0.1:0"])
            .args(["--prefill-min", "2", "--decode-min", "1", "--log-dir"])
            .arg(dir.path())
            .arg("--worker-bin")
            .arg(&script)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pid(&self, name: &str) -> u32 {
        let path = self.path(&format!("{name}.pid"));
        wait_until(|| path.exists(), name);
        fs::read_to_string(&path).unwrap().trim().parse().unwrap()
    }

    fn wait_line(&mut self, part: &str) -> String {
        self.lines.by_ref().map(Result::unwrap).find(|line| line.contains(part)).expect(part)
    }
}

impl Drop for Planner {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn wait_until(mut done: impl FnMut() -> bool, what: &str) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < DEADLINE, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// A planner that is killed could leave workers behind that nobody stops: all must die with it.
#[test]
fn workers_die_with_a_killed_planner() {
    let planner = Planner::start();
    let pids = ["prefill-0", "prefill-1", "decode-0"].map(|name| planner.pid(name));
    kill(planner.process.id(), "-KILL");
    wait_until(|| !pids.iter().any(|pid| alive(*pid)), "the workers' death");
}

/// A worker killed from outside must be started again, and the planner must say why.
#[test]
fn a_killed_worker_is_started_again() {
    let mut planner = Planner::start();
    let first = planner.pid("decode-0");
    planner.wait_line("decode 0 -> 1: start");
    fs::remove_file(planner.path("decode-0.pid")).unwrap();
    kill(first, "-KILL");
    let line = planner.wait_line("decode-0");
    assert!(line.contains("SIGKILL") && line.contains("starting it again in 0.5 s"), "{line}");
    assert!(line.contains("decode-0.log"), "{line}");
    assert_ne!(planner.pid("decode-0"), first);
    assert!(fs::read_to_string(planner.path("decode-0.log")).unwrap().contains("started decode-0"));
}

/// Stopping the planner must let every worker drain, and end well.
#[test]
fn a_stopped_planner_drains_its_workers() {
    let mut planner = Planner::start();
    let names = ["prefill-0", "prefill-1", "decode-0"];
    let pids = names.map(|name| planner.pid(name));
    kill(planner.process.id(), "-TERM");
    assert!(planner.process.wait().unwrap().success());
    for (name, pid) in names.iter().zip(pids) {
        assert!(planner.path(&format!("{name}.drained")).exists(), "{name} was not asked to drain");
        assert!(!alive(pid));
    }
}

/// A planner without its worker program must say where it should be instead of looping.
#[test]
fn a_missing_worker_program_is_reported() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_terrace-planner"));
    let mut process = command
        .args(["--worker-bin", "/nowhere/terrace-worker", "--metrics-listen", "127.0.0.1:0"])
        .args(["--grpc", "http://127.0.0.1:9"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let line = lines.map(Result::unwrap).find(|line| line.contains("prefill-0")).unwrap();
    let _ = process.kill();
    let _ = process.wait();
    assert!(line.contains("127"), "{line}");
}
