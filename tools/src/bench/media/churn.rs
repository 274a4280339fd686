//! Write amplification of a whole daemon: bytes that its process sends to block
//! devices (blocks, header pages, catalog, superblocks) for each byte of blocks
//! that it persisted, while ten times the capacity goes through.

use anyhow::{Context, ensure};
use terrace_client::{Admin, admin};
use terrace_core::{KIB, MIB};
use terrace_proto::v1::{FlushRequest, InfoRequest};

use super::{Line, Options, blocks, stand};

/// Payloads, and whether the bar is for them.
const SIZES: [(u64, bool); 3] = [(64 * KIB, false), (blocks::MODEL_BLOCK_BYTES, true), (2 * MIB, true)];
/// Nvme tier, small so that it turns over quickly.
const NVME_BYTES: u64 = 192 * MIB;
const CAPACITIES: u64 = 10;
/// For blocks that are far from the bar, less says as much.
const CAPACITIES_SMALL: u64 = 2;
/// Bytes written between two flushes, so that eviction from memory never outruns persistence.
const BATCH_BYTES: u64 = 32 * MIB;
const AMPLIFICATION_MAX: f64 = 1.05;

pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (block_bytes, judged) in SIZES {
        let capacities = if judged { CAPACITIES } else { CAPACITIES_SMALL };
        let ratio = amplification(options, block_bytes, NVME_BYTES * capacities).await?;
        let name = format!("write_amplification_{block_bytes}");
        let line = if judged {
            Line::at_most(&name, ratio, AMPLIFICATION_MAX, "times")
        } else {
            Line::plain(&name, ratio, "times")
        };
        line.say();
        lines.push(line);
    }
    Ok(lines)
}

async fn amplification(options: &Options, block_bytes: u64, bytes: u64) -> anyhow::Result<f64> {
    let dir = stand::temp_dir(options)?;
    let daemon = stand::Daemon::start(dir.path(), "512MiB", &format!("{}MiB", NVME_BYTES >> 20)).await?;
    let session = blocks::session(&daemon.socket).await?;
    let space = blocks::space(&session, block_bytes).await?;
    let mut client: Admin = admin(&daemon.grpc).await?;
    let payload = vec![7; usize::try_from(block_bytes)?];
    let of_chain = usize::try_from((BATCH_BYTES / block_bytes).clamp(1, 500))?;
    let chains = bytes.div_ceil(block_bytes * of_chain as u64);
    let written = |client: &mut Admin| {
        let mut client = client.clone();
        async move {
            // What finds no room now is tried again; only what was persisted is counted.
            client.flush(FlushRequest {}).await?;
            let counters = client.info(InfoRequest {}).await?.into_inner().counters;
            counters.get("terrace_persisted_total").copied().context("no counter of persisted blocks")
        }
    };
    // The tier is full and its catalog has its size: what follows is the steady state.
    let warm_up = NVME_BYTES.div_ceil(block_bytes * of_chain as u64);
    let (mut before, mut sent) = (0, 0);
    for chain in 0..warm_up + chains {
        if chain == warm_up {
            // What it writes by itself is no part of the churn.
            daemon.measured().await?;
            before = written(&mut client).await?;
            sent = write_bytes(daemon.pid())?;
        }
        let keys = blocks::keys(u32::try_from(chain)?, of_chain);
        blocks::put(&session, &space, &keys, &payload).await?;
        written(&mut client).await?;
    }
    let persisted = written(&mut client).await? - before;
    let sent = write_bytes(daemon.pid())? - sent;
    ensure!(persisted > 0, "nothing was persisted");
    Ok(super::float(sent) / super::float(persisted * block_bytes))
}

/// Bytes that a process caused to be sent to block devices.
fn write_bytes(pid: u32) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes:"));
    Ok(line.context("the kernel does not count write_bytes")?.trim().parse()?)
}
