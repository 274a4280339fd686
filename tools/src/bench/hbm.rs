//! Leases of blocks in device memory: what another process waits for 128 of them, when
//! no byte moves. With the real daemon; the reader is a process of its own.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use terrace_client::wire::{InfoRequest, Tier};
use terrace_client::{
    Durability, Leased, Outcome, ReadOptions, Reserved, Session, Space, SpaceKind, SpaceManifest, Target,
    WriteOptions,
};
use terrace_core::{ByteCount, TokenCount};
use terrace_gpudirect::{Device, DeviceName};

use super::stand::{Daemon, temp_dir};
use super::{Line, Options};

/// A lease of this many blocks, of SmolLM2's size.
const BLOCKS: usize = 128;
const BLOCK_BYTES: usize = 368_640;
/// Odd, so that the median is a lease.
const ROUNDS: usize = 501;
/// The bar, in microseconds.
const P50_MAX: f64 = 200.0;
const WAIT: Duration = Duration::from_secs(10);
/// Memory of the daemon: on the device, in host memory, on the drive.
const SIZES: [&str; 3] = ["512MiB", "256MiB", "512MiB"];

/// What the reading process is told, on its standard input.
#[derive(Debug, Serialize, Deserialize)]
struct Task {
    socket: std::path::PathBuf,
    device: String,
}

/// What it found, in microseconds.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    /// The first lease, which maps the chunk.
    first: f64,
    p50: f64,
    p99: f64,
}

/// A device of this process by its name.
///
/// # Errors
/// What the driver says, or a name that is none.
fn open(name: &str) -> anyhow::Result<Arc<dyn Device>> {
    // The stand-in has no room of its own: what it maps is the daemon's.
    Ok(name.parse::<DeviceName>()?.open(ByteCount::new(0))?)
}

/// # Errors
/// When there is no such device, or something could not be measured.
pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let device = open(&options.device)?;
    let dir = temp_dir(options)?;
    let [hbm, memory, nvme] = SIZES;
    let more = format!("[[hbm]]\ndevice = \"{}\"\nbytes = \"{hbm}\"\n", options.device);
    let daemon = Daemon::start_with(dir.path(), memory, nvme, &more).await?;
    let (session, space) = connect(&daemon.socket).await?;
    let number = session.add_device(device)?;
    fill(&session, &space, number).await?;
    let before = copied(&daemon.grpc).await?;
    let found = read_elsewhere(&Task { socket: daemon.socket.clone(), device: options.device.clone() })?;
    let moved = copied(&daemon.grpc).await?.saturating_sub(before);
    if moved > 0 {
        bail!("leases of blocks that lie on the device moved {moved} bytes");
    }
    let in_host_memory = pinned(&session, &space).await?;
    Ok(vec![
        Line::at_most("lease_hbm_128_p50", found.p50, P50_MAX, "us"),
        Line::plain("lease_hbm_128_p99", found.p99, "us"),
        Line::plain("lease_hbm_128_first", found.first, "us"),
        Line::cost("lease_hbm_128_to_pinned", found.p50, in_host_memory, "us"),
    ])
}

async fn connect(socket: &std::path::Path) -> anyhow::Result<(Session, Space)> {
    let target =
        Target { socket: Some(socket.to_owned()), client_name: "bench hbm".to_owned(), ..Target::default() };
    let session = Session::connect(&target).await?;
    let manifest = SpaceManifest {
        model: "bench".to_owned(),
        model_fingerprint: Vec::new(),
        weights_generation: 0,
        dtype: "f16".to_owned(),
        layout: "bytes".to_owned(),
        tokens_per_block: TokenCount::new(16),
        block_bytes: ByteCount::new(BLOCK_BYTES as u64),
        kind: SpaceKind::Chain,
        group: 0,
        topology: "canonical".to_owned(),
        rank: 0,
        engine: "bench".to_owned(),
    };
    let space = session.open_space(&manifest).await?;
    Ok((session, space))
}

fn keys() -> Vec<Vec<u8>> {
    (0..BLOCKS).map(|at| format!("block {at}").into_bytes()).collect()
}

fn payload(at: usize) -> Vec<u8> {
    (at..at + BLOCK_BYTES).map(|value| value.to_le_bytes()[0] ^ value.to_le_bytes()[1]).collect()
}

/// Seals the blocks on the device, and gives the window back.
async fn fill(session: &Session, space: &Space, number: u32) -> anyhow::Result<()> {
    let options = WriteOptions { wait: WAIT, ..WriteOptions::default() };
    let mut lease = session.lease_write_on(number, space, &keys(), None, options).await?;
    for (at, grant) in lease.grants.iter_mut().enumerate() {
        match grant {
            Outcome::Granted(Reserved::Device(block)) => block.write(&payload(at))?,
            other => bail!("block {at} was to be written on the device, and is {other:?}"),
        }
    }
    let all: Vec<u32> = (0..).take(BLOCKS).collect();
    lease.seal(&all, Durability::Readable).await?;
    drop(lease);
    session.flush_windows().await?;
    Ok(())
}

/// Bytes that the daemon copied to and from devices.
async fn copied(grpc: &str) -> anyhow::Result<u64> {
    let mut admin = terrace_client::admin(grpc).await?;
    let info = admin.info(InfoRequest {}).await?.into_inner();
    let hbm = info.tiers.iter().filter(|tier| tier.tier() == Tier::Hbm);
    Ok(hbm.filter_map(|tier| tier.activity.as_ref()).map(|activity| activity.copied_bytes_total).sum())
}

fn read_elsewhere(task: &Task) -> anyhow::Result<Found> {
    let mut reader = Command::new(std::env::current_exe()?)
        .args(["bench", "hbm-client"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the reading process")?;
    serde_json::to_writer(reader.stdin.take().context("a piped stdin is there")?, task)?;
    let done = reader.wait_with_output()?;
    if !done.status.success() {
        bail!("the reading process failed: {}", done.status);
    }
    Ok(serde_json::from_slice(&done.stdout)?)
}

/// The reading process.
///
/// # Errors
/// When a block is not on the device, or is not what was sealed.
pub(super) async fn serve() -> anyhow::Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let task: Task = serde_json::from_str(&text)?;
    let (session, space) = connect(&task.socket).await?;
    let number = session.add_device(open(&task.device)?)?;
    let keys = keys();
    let options = ReadOptions { wait: WAIT, ..ReadOptions::default() };
    let mut times = Vec::with_capacity(ROUNDS);
    let mut first = 0.0;
    for round in 0..=ROUNDS {
        let began = Instant::now();
        let lease = session.lease_read_on(number, &space, &keys, options).await?;
        let time = began.elapsed().as_secs_f64() * 1e6;
        let on_device = |grant: &Outcome<Leased>| grant.granted().and_then(Leased::on_device).is_some();
        if !lease.grants.iter().all(on_device) {
            bail!("round {round}: a block is not on the device");
        }
        if round == 0 {
            first = time;
            let mut bytes = vec![0; BLOCK_BYTES];
            for (at, grant) in lease.grants.iter().enumerate() {
                let block = grant.granted().and_then(Leased::on_device).context("it is there")?;
                block.read_verified(&mut bytes)?;
                if bytes != payload(at) {
                    bail!("block {at} has other bytes");
                }
            }
        } else {
            times.push(time);
        }
        lease.release().await?;
    }
    times.sort_by(f64::total_cmp);
    let found = Found { first, p50: times[ROUNDS / 2], p99: times[ROUNDS * 99 / 100] };
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}

/// The median of leases of the same blocks in host memory, where the first one brings them.
async fn pinned(session: &Session, space: &Space) -> anyhow::Result<f64> {
    let keys = keys();
    let options = ReadOptions { wait: WAIT, ..ReadOptions::default() };
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..=ROUNDS {
        let began = Instant::now();
        let lease = session.lease_read(space, &keys, options).await?;
        if lease.prefix() < BLOCKS {
            bail!("round {round}: only {} blocks came to host memory", lease.prefix());
        }
        if round > 0 {
            times.push(began.elapsed().as_secs_f64() * 1e6);
        }
        lease.release().await?;
    }
    Ok(super::median(&times))
}
