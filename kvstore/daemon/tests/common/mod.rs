//! A real `terraced` in a folder of its own, and what every test asks of it.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

pub(crate) mod lane;
pub(crate) mod load;

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use terrace_client::wire::{self, InfoRequest, InfoResponse};
use terrace_client::{ClientError, Outcome, ReadOptions, Session, Space, SpaceKind, SpaceManifest, Target};
use terrace_core::{ByteCount, TokenCount};

pub(crate) const BLOCK_BYTES: usize = 256 << 10;
/// Longest wait for anything; the machine may be busy with other tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Running {
    child: Child,
    pub(crate) grpc: String,
    /// Address of `/metrics`.
    pub(crate) metrics: String,
    pub(crate) folder: PathBuf,
    pub(crate) incarnation: u64,
}

pub(crate) fn folder() -> tempfile::TempDir {
    // Not in /tmp, which may be a tmpfs without O_DIRECT; short, for the socket's path.
    tempfile::Builder::new().prefix("td").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub(crate) fn config(folder: &Path, extra: &str) -> PathBuf {
    let path = folder.join("terraced.toml");
    // Everything before the first table is a key of the file itself.
    let (keys, tables) = extra.find('[').map_or((extra, ""), |at| extra.split_at(at));
    let data = folder.join("data");
    let device = if tables.contains("[[device]]") {
        String::new()
    } else {
        format!("[[device]]\npath = \"{}\"\nbytes = \"64MiB\"\n", data.join("nvme0.dat").display())
    };
    let mut text =
        format!("data_dir = \"{}\"\nlane_socket = \"{}\"\n", data.display(), socket(folder).display(),);
    for (key, value) in [
        ("grpc_listen", "\"127.0.0.1:0\""),
        ("metrics_listen", "\"127.0.0.1:0\""),
        ("pinned_bytes", "\"32MiB\""),
        ("chunk_bytes", "\"4MiB\""),
        ("persist_delay_ms", "50"),
        ("window_idle_ms", "300"),
    ] {
        if !keys.contains(&format!("{key} =")) {
            text.push_str(&format!("{key} = {value}\n"));
        }
    }
    text.push_str(&format!("{keys}\n{device}{tables}\n"));
    std::fs::write(&path, text).unwrap();
    path
}

/// Socket paths are short; the folder's may not be.
pub(crate) fn socket(folder: &Path) -> PathBuf {
    std::env::temp_dir().join(format!("{}.sock", folder.file_name().unwrap().to_str().unwrap()))
}

impl Running {
    pub(crate) fn start(folder: &Path, extra: &str) -> Self {
        Self::try_start(folder, extra).unwrap_or_else(|printed| panic!("terraced does not start:\n{printed}"))
    }

    /// The daemon when it is ready, or what it printed before it ended.
    pub(crate) fn try_start(folder: &Path, extra: &str) -> Result<Self, String> {
        Self::try_start_in(folder, extra, &[])
    }

    /// The same with variables of the environment.
    pub(crate) fn try_start_in(
        folder: &Path,
        extra: &str,
        environment: &[(&str, std::ffi::OsString)],
    ) -> Result<Self, String> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_terraced"))
            .envs(environment.iter().cloned())
            .arg("--config")
            .arg(config(folder, extra))
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut printed = String::new();
        for line in lines.by_ref().map_while(Result::ok) {
            eprintln!("{line}");
            if let Some((_, facts)) = line.split_once("terraced ready: grpc ") {
                let mut words = facts.split([',', ' ']);
                let grpc = format!("http://{}", words.next().unwrap());
                let after = facts.split_once("incarnation ").unwrap().1;
                let incarnation = after.split(' ').next().unwrap().parse().unwrap();
                let metrics = facts.split_once("metrics=").unwrap().1.trim().to_owned();
                std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| eprintln!("{line}")));
                return Ok(Self { child, grpc, metrics, folder: folder.to_owned(), incarnation });
            }
            printed.push_str(&line);
            printed.push('\n');
        }
        child.wait().unwrap();
        Err(printed)
    }

    pub(crate) fn target(&self, lane: bool) -> Target {
        Target {
            socket: lane.then(|| socket(&self.folder)),
            grpc: Some(self.grpc.clone()),
            client_name: "test".to_owned(),
            ..Target::default()
        }
    }

    pub(crate) async fn session(&self, lane: bool) -> Session {
        Session::connect(&self.target(lane)).await.unwrap()
    }

    pub(crate) async fn info(&self) -> InfoResponse {
        let mut admin = terrace_client::admin(&self.grpc).await.unwrap();
        admin.info(InfoRequest {}).await.unwrap().into_inner()
    }

    /// Nothing may leak: when all sessions are gone, no frame is being filled or
    /// pinned, and every frame is in exactly one state.
    pub(crate) async fn assert_quiet(&self) {
        let began = Instant::now();
        loop {
            let info = self.info().await;
            let tiers: Vec<_> = info.tiers.iter().filter_map(|tier| tier.frames.as_ref()).collect();
            for frames in &tiers {
                let sum = frames.free + frames.filling + frames.sealed + frames.evicting + frames.quarantined;
                assert_eq!(sum, frames.capacity, "frames are lost: {frames:?}");
            }
            let busy = tiers.iter().any(|frames| frames.filling + frames.pinned > 0);
            if !busy && info.sessions == 0 && info.leases == 0 {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "frames leak: {info:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a crash would lose nothing.
    pub(crate) async fn persisted(&self) {
        let mut admin = terrace_client::admin(&self.grpc).await.unwrap();
        let flushed = admin.flush(wire::FlushRequest {}).await.unwrap().into_inner();
        assert_eq!(flushed.failed, 0, "{flushed:?}");
        assert_eq!(self.info().await.unpersisted_bytes, 0);
    }

    /// Waits until every slot has been looked at, if the catalog was lost.
    pub(crate) async fn scanned(&self) {
        let began = Instant::now();
        loop {
            let info = self.info().await;
            let waits = info.tiers.iter().any(|tier| tier.note.contains("not scanned yet"));
            if !waits && info.scan_done >= 1.0 {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "the scan does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What the process has.
    pub(crate) fn footprint(&self) -> Footprint {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let status = std::fs::read_to_string(proc.join("status")).unwrap();
        let anon = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        let kib: u64 = anon.trim().trim_end_matches(" kB").parse().unwrap();
        let entries = std::fs::read_dir(proc.join("fd")).unwrap().map(Result::unwrap);
        // One that is closed meanwhile is none.
        let open = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let (chunks, others): (Vec<_>, Vec<_>) =
            open.partition(|file| file.to_string_lossy().contains("memfd:terrace-"));
        Footprint { bytes: kib << 10, descriptors: others.len(), of_chunks: chunks.len() }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn terminate(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

/// What a process has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Footprint {
    /// Memory that is nobody else's, in bytes.
    pub(crate) bytes: u64,
    /// Open descriptors but those of chunks.
    pub(crate) descriptors: usize,
    /// Those of chunks, which come and go.
    pub(crate) of_chunks: usize,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(socket(&self.folder));
    }
}

pub(crate) fn http(address: &str, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    // HTTP/1.0 so that the answer is not cut into pieces.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 200 "), "{answer}");
    answer
}

pub(crate) fn manifest(rank: u32) -> SpaceManifest {
    SpaceManifest {
        model: "test".into(),
        model_fingerprint: vec![1],
        weights_generation: 1,
        dtype: "f16".into(),
        layout: "bytes".into(),
        tokens_per_block: TokenCount::new(16),
        block_bytes: ByteCount::new(BLOCK_BYTES as u64),
        kind: SpaceKind::Chain,
        group: 0,
        topology: "canonical".into(),
        rank,
        engine: "test".into(),
    }
}

pub(crate) fn keys(count: u32) -> Vec<[u8; 4]> {
    (0..count).map(u32::to_le_bytes).collect()
}

/// Bytes that no other block has.
pub(crate) fn payload(key: [u8; 4], life: u8) -> Vec<u8> {
    let mut state = u32::from_le_bytes(key).wrapping_mul(2_654_435_761).wrapping_add(u32::from(life) + 1);
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    while bytes.len() < BLOCK_BYTES {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

pub(crate) fn payloads(keys: &[[u8; 4]], life: u8) -> Vec<Vec<u8>> {
    keys.iter().map(|key| payload(*key, life)).collect()
}

/// A small seeded generator, so that a run follows from the seed that it prints.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is not zero.
    pub(crate) fn below(&mut self, end: u32) -> u32 {
        u32::try_from((self.next() >> 11) % u64::from(end)).unwrap()
    }

    pub(crate) fn percent(&mut self, chance: u32) -> bool {
        self.below(100) < chance
    }
}

/// The seed of a random test: from the environment, or of this moment. Always printed.
pub(crate) fn seed(name: &str) -> u64 {
    let chosen = std::env::var(name).ok().and_then(|text| text.parse().ok());
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    let seed = chosen.unwrap_or_else(|| u64::from(now()));
    eprintln!("{name}={seed}");
    seed
}

/// How often something is done: from the environment, or so often.
pub(crate) fn times(name: &str, short: u32) -> u32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(short)
}

/// Bytes that follow from space, generation and key alone, and are no other block's.
pub(crate) fn content(rank: u32, generation: u64, key: u32, bytes: usize) -> Vec<u8> {
    let mut random = Random::new((u64::from(rank) << 56) ^ (generation << 32) ^ u64::from(key));
    // The first numbers of neighbouring seeds are alike.
    random.next();
    random.next();
    let mut content = Vec::with_capacity(bytes + 8);
    while content.len() < bytes {
        content.extend_from_slice(&random.next().to_le_bytes());
    }
    content.truncate(bytes);
    content
}

/// The manifest of a space with blocks of this many bytes.
pub(crate) fn manifest_of(rank: u32, bytes: usize) -> SpaceManifest {
    SpaceManifest { block_bytes: ByteCount::new(bytes as u64), ..manifest(rank) }
}

/// Blocks as the daemon grants them, on the lane: nobody compares a checksum between the daemon and the test. What is
/// throttled is asked for again.
pub(crate) async fn granted(session: &Session, space: &Space, names: &[[u8; 4]]) -> Vec<Option<Vec<u8>>> {
    let mut found = vec![None; names.len()];
    let mut open: Vec<usize> = (0..names.len()).collect();
    let deadline = Instant::now() + PATIENCE;
    while !open.is_empty() && Instant::now() < deadline {
        let wanted: Vec<[u8; 4]> = open.iter().map(|index| names[*index]).collect();
        let options = ReadOptions { wait: PATIENCE, ..ReadOptions::default() };
        let lease = match session.lease_read(space, &wanted, options).await {
            Ok(lease) => lease,
            Err(ClientError::Throttled { .. }) => {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
            Err(error) => panic!("a read lease is refused: {error}"),
        };
        let mut again = Vec::new();
        for (index, grant) in open.iter().zip(&lease.grants) {
            match grant {
                Outcome::Granted(block) => {
                    let mut bytes = vec![0; usize::try_from(block.length().get()).unwrap()];
                    found[*index] = block.read_into(&mut bytes).is_ok().then_some(bytes);
                }
                Outcome::Throttled => again.push(*index),
                Outcome::Promoting | Outcome::Missing(_) | Outcome::Exists => {}
            }
        }
        lease.release().await.unwrap();
        if again.len() == open.len() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        open = again;
    }
    found
}
