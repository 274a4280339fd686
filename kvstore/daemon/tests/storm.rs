//! Devices that fail and lie at random under a whole daemon: thousands of reads
//! and writes, and each get is a miss or the exact bytes.
//!
//! `TERRACE_STORM_SEED=n` repeats a run, `TERRACE_STORMS=n` makes n of them.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{PATIENCE, Random, content, folder, granted, manifest_of, seed, socket, times};
use terrace_client::{ClientError, Durability, MatchMode, SealOutcome, Session, Space, Target};
use terrace_core::BlockId;
use terrace_media::{FaultyDevice, Hooks, Weather};
use terraced::{Config, Daemon};

const BYTES: usize = 48 << 10;
const WAIT: Duration = Duration::from_secs(20);
const DEVICES: usize = 2;
/// Sessions that work side by side, each on a space of its own.
const SESSIONS: u32 = 3;
/// What one session does in one storm.
const STEPS: u32 = 250;

/// A daemon in this process, with its devices in our hands.
struct Node {
    daemon: Daemon,
    devices: Vec<Arc<FaultyDevice>>,
}

impl Node {
    async fn start(folder: &Path) -> Self {
        let devices = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&devices);
        let wrap_device: terrace_media::WrapDevice = Box::new(move |_, inner| {
            let device = Arc::new(FaultyDevice::new(inner));
            device.remember(512);
            keep.lock().unwrap().push(Arc::clone(&device));
            device
        });
        let hooks = Hooks { wrap_device: Some(wrap_device), ..Hooks::default() };
        let daemon = Daemon::start(config(folder), hooks).await.unwrap();
        let devices = std::mem::take(&mut *devices.lock().unwrap());
        assert_eq!(devices.len(), DEVICES);
        Self { daemon, devices }
    }

    async fn session(&self, lane: bool) -> Session {
        let target = Target {
            socket: lane.then(|| self.daemon.lane.clone()),
            grpc: Some(format!("http://{}", self.daemon.grpc)),
            client_name: "storm".to_owned(),
            ..Target::default()
        };
        Session::connect(&target).await.unwrap()
    }

    fn set_weather(&self, weather: impl Fn(usize) -> Option<Weather>) {
        for (number, device) in self.devices.iter().enumerate() {
            device.set_weather(weather(number));
        }
    }

    fn harmed(&self) -> BTreeSet<BlockId> {
        self.devices.iter().flat_map(|device| device.harmed()).collect()
    }

    /// Nothing leaks: nobody holds or fills a frame, and every frame is in one state.
    async fn assert_quiet(&self) {
        let began = Instant::now();
        loop {
            let (views, sessions, leases, waiting) = self.daemon.engine().view(|core| {
                (core.tier_views(), core.session_count(), core.lease_count(), core.waiting_count())
            });
            let pinned = views.pinned.frames;
            let filling = pinned.filling + pinned.pinned + pinned.quarantined;
            let moving: u64 =
                views.devices.iter().map(|view| view.frames.filling + view.frames.evicting).sum();
            if filling + moving == 0 && sessions == 0 && leases == 0 && waiting == 0 {
                return self.daemon.engine().view(terrace_core::Core::check);
            }
            assert!(
                began.elapsed() < PATIENCE,
                "{sessions} sessions, {leases} leases, {waiting} wait; {views:?}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What is missing while a device is taken out is no loss.
    fn are_devices_well(&self) -> bool {
        self.daemon.engine().view(|core| core.tier_views().devices.iter().all(|view| view.usable))
    }

    /// Waits for devices that were taken out. False: one stays out, as after five times it does.
    async fn wait_for_devices(&self) -> bool {
        let began = Instant::now();
        while !self.are_devices_well() {
            if began.elapsed() >= PATIENCE {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        true
    }

    /// Until everything sealed is on a device, or was given up.
    async fn settle(&self) {
        let began = Instant::now();
        while self.daemon.engine().view(terrace_core::Core::unpersisted).get() > 0 {
            assert!(began.elapsed() < PATIENCE, "blocks are never written");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn config(folder: &Path) -> Config {
    let data = folder.join("data");
    let mut text = format!("data_dir = {data:?}\nlane_socket = {:?}\n", socket(folder));
    text.push_str("grpc_listen = \"127.0.0.1:0\"\nmetrics_listen = \"127.0.0.1:0\"\npersist_delay_ms = 20\n");
    text.push_str("pinned_bytes = \"12MiB\"\nchunk_bytes = \"2MiB\"\nwindow_idle_ms = 100\n");
    for number in 0..DEVICES {
        let path = data.join(format!("nvme{number}.dat"));
        text.push_str(&format!("[[device]]\npath = {path:?}\nbytes = \"128MiB\"\n"));
    }
    Config::parse(&text).unwrap()
}

/// Who reads in place, without a check of its own.
fn is_lane(rank: u32) -> bool {
    rank.is_multiple_of(2)
}

/// What one session knows: which keys exist, in which generation, and which of them are durable.
#[derive(Default)]
struct Known {
    rank: u32,
    generation: u64,
    keys: u32,
    durable: BTreeMap<u32, BlockId>,
    reads: u64,
    misses: u64,
    not_durable: u64,
}

impl Known {
    /// Reads keys and compares what comes.
    async fn read(&mut self, session: &Session, space: &Space, keys: &[u32]) -> Vec<bool> {
        let names: Vec<[u8; 4]> = keys.iter().map(|key| key.to_le_bytes()).collect();
        let found = if is_lane(self.rank) {
            granted(session, space, &names).await
        } else {
            match session.read_within(space, &names, WAIT).await {
                Ok(found) => found,
                Err(ClientError::Throttled { .. }) => vec![None; keys.len()],
                Err(error) => panic!("a read failed: {error}"),
            }
        };
        for (key, bytes) in keys.iter().zip(&found) {
            if let Some(bytes) = bytes {
                assert!(*key < self.keys, "block {key} was never written and is there");
                let right = content(self.rank, self.generation, *key, BYTES);
                assert!(*bytes == right, "space {} block {key} came back with other bytes", self.rank);
            }
        }
        self.reads += found.len() as u64;
        self.misses += found.iter().filter(|bytes| bytes.is_none()).count() as u64;
        found.iter().map(Option::is_some).collect()
    }

    async fn write(&mut self, session: &Session, space: &Space, keys: &[u32], durability: Durability) {
        let names: Vec<[u8; 4]> = keys.iter().map(|key| key.to_le_bytes()).collect();
        let payloads: Vec<_> =
            keys.iter().map(|key| content(self.rank, self.generation, *key, BYTES)).collect();
        let outcomes = match session.write(space, &names, None, &payloads, durability).await {
            Ok(outcomes) => outcomes,
            Err(ClientError::Throttled { .. }) => return,
            Err(error) => panic!("a write failed: {error}"),
        };
        for (key, outcome) in keys.iter().zip(outcomes) {
            match (durability, outcome) {
                (Durability::Durable, SealOutcome::Sealed) => {
                    self.durable.insert(*key, space.block_id(&key.to_le_bytes()));
                }
                (_, SealOutcome::NotDurable) => self.not_durable += 1,
                (_, SealOutcome::Sealed | SealOutcome::Already | SealOutcome::Lost) => {}
                (_, SealOutcome::Conflict) => panic!("block {key} conflicts with itself"),
            }
        }
    }

    /// One random thing.
    async fn step(&mut self, session: &Session, space: &mut Space, random: &mut Random) {
        match random.below(100) {
            0..=39 => {
                let count = 1 + random.below(6);
                let first = if random.percent(80) { self.keys } else { random.below(self.keys + 1) };
                let keys: Vec<u32> = (first..first + count).collect();
                self.keys = self.keys.max(first + count);
                let durable = random.percent(60);
                let durability = if durable { Durability::Durable } else { Durability::Readable };
                self.write(session, space, &keys, durability).await;
            }
            40..=91 => {
                let keys: Vec<u32> = (0..=random.below(12)).map(|_| random.below(self.keys + 3)).collect();
                self.read(session, space, &keys).await;
            }
            92..=97 => {
                let names: Vec<[u8; 4]> = (0..self.keys + 3).map(u32::to_le_bytes).collect();
                let (_, found) = session.exists(&[&*space], &names, MatchMode::Set).await.unwrap();
                assert!(found.iter().skip(self.keys as usize).all(|there| !there));
            }
            _ => {
                // A device may fail the write of its superblock, and all of them may be out, which shows before the clear
                // or while it is recorded. It is then done later: who was refused asks again.
                let until = Instant::now() + PATIENCE;
                while let Err(error) = session.clear(space).await {
                    let said = error.to_string();
                    let known = ["catalog", "no device can record it", "no device could record that"];
                    let is_right = known.iter().any(|reason| said.contains(reason));
                    assert!(is_right, "a clear failed: {error}");
                    assert!(Instant::now() < until, "no clear is ever done: {error}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                *space = session.open_space(&manifest_of(self.rank, BYTES)).await.unwrap();
                assert!(space.generation() > self.generation);
                *self = Self { rank: self.rank, generation: space.generation(), ..Self::default() };
            }
        }
    }

    /// All that is there is right; what is durable and was not harmed is there.
    async fn assert_kept(&mut self, node: &Node, harmed: &BTreeSet<BlockId>) -> u64 {
        let session = node.session(is_lane(self.rank)).await;
        let space = session.open_space(&manifest_of(self.rank, BYTES)).await.unwrap();
        assert_eq!(space.generation(), self.generation);
        let keys: Vec<u32> = (0..self.keys).collect();
        let mut kept = 0;
        let promised =
            |known: &Self, key: &u32| known.durable.get(key).is_some_and(|block| !harmed.contains(block));
        for keys in keys.chunks(64) {
            let missing = loop {
                let well = node.are_devices_well();
                let found = self.read(&session, &space, keys).await;
                let mut both = keys.iter().zip(found);
                let missing = both.find(|(key, there)| !there && promised(self, key)).map(|(key, _)| *key);
                if missing.is_none() || (well && node.are_devices_well()) {
                    break missing;
                }
                assert!(node.wait_for_devices().await, "a device without faults stays out");
            };
            assert!(missing.is_none(), "space {} block {missing:?} was durable and is gone", self.rank);
            kept += keys.iter().filter(|key| promised(self, key)).count() as u64;
        }
        session.close();
        kept
    }
}

/// What all storms together did, so that none of it can silently stop happening.
#[derive(Default, Debug)]
struct Seen {
    faults: BTreeMap<(&'static str, &'static str), u64>,
    reads: u64,
    misses: u64,
    durable: u64,
    kept: u64,
    not_durable: u64,
    checksum_failures: u64,
    device_faults: u64,
}

impl Seen {
    fn assert_all(&self) {
        let lies = ["torn", "torn sectors", "bit flip", "misdirected", "lost"];
        for kind in lies.into_iter().chain(["short", "failed", "slow"]) {
            assert!(self.faults.contains_key(&("write", kind)), "no {kind} write: {self:?}");
        }
        // Reads of devices are fewer: their kinds are tried one by one in the tests of media.
        let reads = |kind: &'static str| self.faults.get(&("read", kind)).copied().unwrap_or_default();
        let read_lies: u64 = lies.into_iter().map(reads).sum();
        assert!(read_lies > 0 && reads("failed") + reads("short") > 0, "{self:?}");
        assert!(self.faults.contains_key(&("sync", "failed")), "{self:?}");
        assert!(self.checksum_failures > 0 && self.device_faults > 0 && self.not_durable > 0, "{self:?}");
        assert!(self.kept * 2 > self.durable, "most durable blocks meet no lie: {self:?}");
        assert!(self.misses * 2 < self.reads, "most reads find their block: {self:?}");
    }
}

async fn storm(seed: u64, permille: u64, seen: &mut Seen) {
    eprintln!("storm of seed {seed}, {permille} of 1000 requests");
    let folder = folder();
    let node = Arc::new(Node::start(folder.path()).await);
    let weather = |number: usize| Weather {
        seed: seed ^ (number as u64 + 1),
        failures: permille / 2,
        lies: permille / 2,
        delays: permille / 4,
    };
    node.set_weather(|number| Some(weather(number)));
    let mut tasks = Vec::new();
    for rank in 0..SESSIONS {
        let node = Arc::clone(&node);
        tasks.push(tokio::spawn(async move {
            let session = node.session(is_lane(rank)).await;
            let mut space = session.open_space(&manifest_of(rank, BYTES)).await.unwrap();
            let mut known = Known { rank, generation: space.generation(), ..Known::default() };
            let mut random = Random::new(seed ^ (u64::from(rank) << 32));
            for _ in 0..STEPS {
                known.step(&session, &mut space, &mut random).await;
            }
            session.close();
            known
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.unwrap());
    }
    after_the_storm(node, folder.path(), all, seen).await;
}

/// The sky clears. What was promised must be there now, and after each kind of start.
async fn after_the_storm(node: Arc<Node>, folder: &Path, mut all: Vec<Known>, seen: &mut Seen) {
    node.set_weather(|_| None);
    node.settle().await;
    let harmed = node.harmed();
    let well = node.wait_for_devices().await;
    for known in &mut all {
        if well {
            seen.kept += known.assert_kept(&node, &harmed).await;
        }
        seen.durable += known.durable.len() as u64;
        seen.not_durable += known.not_durable;
        seen.reads += known.reads;
        seen.misses += known.misses;
    }
    node.assert_quiet().await;
    for device in &node.devices {
        for (fault, times) in device.injected() {
            *seen.faults.entry(fault).or_default() += times;
        }
    }
    let counters = node.daemon.engine().view(|core| *core.counters());
    assert_eq!(counters.evictions_nvme, 0, "the devices are too small for this test");
    seen.checksum_failures += counters.checksum_failures;
    seen.device_faults += counters.device_faults;
    stop(node).await;
    for lost_catalog in [false, true] {
        if lost_catalog {
            std::fs::remove_dir_all(folder.join("data/catalog")).unwrap();
        }
        let node = Arc::new(Node::start(folder).await);
        let scanned = || {
            node.daemon
                .engine()
                .view(|core| core.tier_views().devices.iter().all(|view| view.slots_unscanned == 0))
        };
        let began = Instant::now();
        while !scanned() {
            assert!(began.elapsed() < PATIENCE, "the scan does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for known in &mut all {
            known.assert_kept(&node, &harmed).await;
        }
        node.assert_quiet().await;
        stop(node).await;
    }
}

async fn stop(node: Arc<Node>) {
    let node = Arc::into_inner(node).expect("every session is closed");
    node.daemon.stop().await;
}

/// Failures and lies of every kind, from rare to one request in ten, under sessions that write, read and clear: no
/// read may give other bytes, no durable block that the device told the truth about may be missing, nothing may leak.
#[tokio::test(flavor = "multi_thread")]
async fn storms_never_change_a_byte() {
    let first = seed("TERRACE_STORM_SEED");
    let mut seen = Seen::default();
    for number in 0..times("TERRACE_STORMS", 3) {
        let permille = [10, 40, 100][number as usize % 3];
        storm(first + u64::from(number), permille, &mut seen).await;
    }
    eprintln!("{seen:?}");
    seen.assert_all();
}

/// One of two devices goes bad, in one way after another: every block of the other one must be served all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_device_harms_no_other() {
    const COUNT: u32 = 200;
    let folder = folder();
    let node = Arc::new(Node::start(folder.path()).await);
    let session = node.session(true).await;
    let space = session.open_space(&manifest_of(0, BYTES)).await.unwrap();
    let mut known = Known { generation: space.generation(), keys: COUNT, ..Known::default() };
    let keys: Vec<u32> = (0..COUNT).collect();
    known.write(&session, &space, &keys, Durability::Durable).await;
    assert_eq!(known.durable.len(), COUNT as usize);
    let device_of = |block: &BlockId| {
        node.daemon.engine().view(|core| core.stat(*block).and_then(|view| view.disk)).unwrap().0.device.get()
    };
    let good: Vec<u32> =
        known.durable.iter().filter(|(_, block)| device_of(block) == 0).map(|(key, _)| *key).collect();
    assert!(good.len() > 50 && good.len() < 150, "striped: {}", good.len());
    session.close();
    stop(node).await;
    for (failures, lies) in [(1000, 0), (0, 1000)] {
        let node = Arc::new(Node::start(folder.path()).await);
        let bad = Weather { seed: 5, failures, lies, delays: 0 };
        node.set_weather(|number| (number == 1).then_some(bad));
        let session = node.session(true).await;
        let space = session.open_space(&manifest_of(0, BYTES)).await.unwrap();
        // A slow machine may take the good device out for a moment: that is no harm done by the other.
        let began = Instant::now();
        loop {
            let is_well = || {
                let first_usable = |core: &terrace_core::Core| core.tier_views().devices[0].usable;
                node.daemon.engine().view(first_usable)
            };
            let well = is_well();
            let found = known.read(&session, &space, &keys).await;
            if good.iter().all(|key| found[*key as usize]) {
                break;
            }
            assert!(
                !(well && is_well()) && began.elapsed() < PATIENCE,
                "a block of the good device is missing"
            );
        }
        let injected: u64 = node.devices[1].injected().values().sum();
        eprintln!("{failures} failures, {lies} lies: {injected} requests");
        assert!(injected >= 16, "the bad device was asked until it was taken out: {injected}");
        session.close();
        node.assert_quiet().await;
        stop(node).await;
    }
}
