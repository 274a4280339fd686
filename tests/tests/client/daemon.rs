//! A `terraced` of its own for each test: small chunks, a small device, free ports.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use terrace_client::wire::{InfoRequest, InfoResponse, ListLeasesRequest, Tier, TierInfo};
use terrace_client::{Session, Space, SpaceKind, SpaceManifest, Target};
use terrace_core::{ByteCount, TokenCount};

/// Payload of a small test block: not a multiple of the page.
pub(crate) const BLOCK_BYTES: usize = 24 << 10;

/// A running daemon in a directory of its own. Killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
    settings: String,
    grpc: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Daemon {
    /// Starts one. `settings` are further lines of its configuration.
    pub(crate) fn start(settings: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("terrace-client").tempdir().unwrap();
        let (child, grpc) = spawn(&dir, settings);
        Self { child, dir, settings: settings.to_owned(), grpc }
    }

    pub(crate) fn kill(&mut self) {
        // It may be dead already.
        let _dead = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Lets it stand still, until [`Daemon::go_on`].
    pub(crate) fn stand_still(&self) {
        self.signal("STOP");
        let tasks = format!("/proc/{}/task", self.child.id());
        let deadline = Instant::now() + Duration::from_secs(20);
        // A signal is sent long before the last thread has stopped.
        while !std::fs::read_dir(&tasks).unwrap().all(|task| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        }) {
            assert!(Instant::now() < deadline, "it does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn go_on(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let done = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    /// Starts it again in the same directory.
    pub(crate) fn restart(&mut self) {
        let (child, grpc) = spawn(&self.dir, &self.settings);
        self.child = child;
        self.grpc = grpc;
    }

    pub(crate) fn grpc(&self) -> String {
        self.grpc.clone()
    }

    /// Reaches it by both ways; sessions take the socket.
    pub(crate) fn target(&self) -> Target {
        Target {
            socket: Some(socket(&self.dir)),
            grpc: Some(self.grpc()),
            client_name: "client tests".to_owned(),
            ..Target::default()
        }
    }

    /// Reaches it by gRPC only.
    pub(crate) fn remote(&self) -> Target {
        Target { socket: None, ..self.target() }
    }

    pub(crate) async fn session(&self) -> Session {
        Session::connect(&self.target()).await.unwrap()
    }

    pub(crate) async fn open(&self) -> (Session, Space) {
        let session = self.session().await;
        let space = session.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
        (session, space)
    }

    pub(crate) async fn info(&self) -> InfoResponse {
        let mut admin = terrace_client::admin(&self.grpc).await.unwrap();
        admin.info(InfoRequest {}).await.unwrap().into_inner()
    }

    pub(crate) async fn pinned(&self) -> TierInfo {
        let tiers = self.info().await.tiers;
        tiers.into_iter().find(|tier| tier.tier() == Tier::Pinned).unwrap()
    }

    pub(crate) async fn leases(&self) -> u32 {
        let mut admin = terrace_client::admin(&self.grpc).await.unwrap();
        admin.list_leases(ListLeasesRequest { limit: 0 }).await.unwrap().into_inner().total
    }

    /// Waits until nothing is leased or being filled, and the frames add up.
    pub(crate) async fn wait_quiet(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let frames = self.pinned().await.frames.unwrap();
            let leases = self.leases().await;
            let sum = frames.free + frames.filling + frames.sealed + frames.evicting + frames.quarantined;
            assert_eq!(sum, frames.capacity, "frames add up: {frames:?}");
            if frames.filling == 0 && frames.pinned == 0 && leases == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "still not quiet: {leases} leases, {frames:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Waits until `done` holds, looking again and again.
pub(crate) async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done().await {
        assert!(Instant::now() < deadline, "still waiting for this: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A space for blocks of this length.
pub(crate) fn manifest(model: &str, block_bytes: usize) -> SpaceManifest {
    SpaceManifest {
        model: model.to_owned(),
        model_fingerprint: b"one".to_vec(),
        weights_generation: 1,
        dtype: "f16".to_owned(),
        layout: "layer,kv,slot,head,dim".to_owned(),
        tokens_per_block: TokenCount::new(16),
        block_bytes: ByteCount::new(block_bytes as u64),
        kind: SpaceKind::Chain,
        group: 0,
        topology: "canonical".to_owned(),
        rank: 0,
        engine: "terrace".to_owned(),
    }
}

/// Keys `first..first + count` of a test's own chain.
pub(crate) fn keys(first: usize, count: usize) -> Vec<Vec<u8>> {
    (first..first + count).map(|at| format!("key {at}").into_bytes()).collect()
}

/// A payload that no other seed has.
pub(crate) fn payload(seed: usize, bytes: usize) -> Vec<u8> {
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(bytes).collect()
}

pub(crate) fn payloads(first: usize, count: usize) -> Vec<Vec<u8>> {
    (first..first + count).map(|seed| payload(seed, BLOCK_BYTES)).collect()
}

fn socket(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("lane.sock")
}

fn spawn(dir: &tempfile::TempDir, settings: &str) -> (Child, String) {
    let path = dir.path();
    let config = format!(
        "data_dir = {data:?}\nlane_socket = {socket:?}\ngrpc_listen = \"127.0.0.1:0\"\n\
         metrics_listen = \"127.0.0.1:0\"\npinned_bytes = \"64MiB\"\nchunk_bytes = \"4MiB\"\n\
         persist_delay_ms = 50\nlog = \"info\"\n{settings}\n\
         [[device]]\npath = {device:?}\nbytes = \"128MiB\"\n",
        data = path.join("data"),
        socket = socket(dir),
        device = path.join("nvme0.dat"),
    );
    let file = path.join("terraced.toml");
    std::fs::write(&file, config).unwrap();
    let mut child = Command::new(program())
        .arg("--config")
        .arg(&file)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (found, grpc) = mpsc::channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            eprintln!("{line}");
            if line.contains("terraced ready") {
                // The test may be over already.
                let _gone = found.send(address_in(&line));
            }
        }
    });
    match grpc.recv_timeout(Duration::from_secs(30)) {
        Ok(grpc) => (child, grpc),
        Err(error) => {
            let _dead = child.kill();
            panic!("terraced did not get ready: {error}");
        }
    }
}

/// The daemon's program, beside the test binary's folder.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join("terraced");
    assert!(path.is_file(), "{} is not built; run `cargo build --release --workspace` first", path.display());
    path
}

/// The first address in a line.
fn address_in(line: &str) -> String {
    let start = line.find("127.0.0.1:").expect("the ready line names the gRPC address");
    line[start..].chars().take_while(|letter| letter.is_ascii_digit() || ".:".contains(*letter)).collect()
}
