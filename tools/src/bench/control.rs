//! `bench lease`: questions and answers without block bytes, against a bare echo
//! of equal messages over a Unix socket, one at a time and many on the way; and
//! beside a client that floods the daemon.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;
use bytes::Bytes;
use hdrhistogram::Histogram;
use prost::Message;
use terrace_client::{MatchMode, ReadOptions, Session, Space, wire};
use terrace_lane::PACKED_GRANT_BYTES;

use super::{Line, Options, blocks, fair, stand};

/// Small, so that many are resident.
pub(super) const BLOCK_BYTES: u64 = 64 << 10;
const BLOCKS: usize = 128;
/// Questions before those that count.
const WARM: u32 = 500;
const QUESTIONS: u32 = 5_000;
/// Questions on the way at once.
const DEPTH: usize = 16;
/// Ours and the echo take turns so often.
const TURNS: u32 = 5;
/// How many times the echo's p99 ours may be.
const P99_TIMES: f64 = 4.0;

/// One kind of question.
#[derive(Clone, Copy)]
pub(super) struct Case {
    name: &'static str,
    ask: Ask,
    blocks: usize,
    /// What it may take more than the echo, in us.
    more: f64,
}

#[derive(Clone, Copy)]
enum Ask {
    Lease,
    Exists,
}

const CASES: [Case; 3] = [
    Case { name: "lease_1", ask: Ask::Lease, blocks: 1, more: 20.0 },
    Case { name: "lease_128", ask: Ask::Lease, blocks: BLOCKS, more: 100.0 },
    Case { name: "exists_128", ask: Ask::Exists, blocks: BLOCKS, more: 40.0 },
];

/// On a thread with an event loop of its own, as the echo's client is one thread.
pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let options = options.clone();
    tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(measure(&options))
    })
    .await?
}

async fn measure(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let daemon = stand::Daemon::start(dir.path(), "512MiB", "512MiB").await?;
    daemon.measured().await?;
    let session = blocks::session(&daemon.socket).await?;
    let space = blocks::space(&session, BLOCK_BYTES).await?;
    let keys = blocks::keys(1, BLOCKS);
    blocks::put(&session, &space, &keys, &vec![7; usize::try_from(BLOCK_BYTES)?]).await?;
    compared(&daemon.socket, &keys).await?;
    let mut lines = Vec::new();
    for case in CASES {
        for depth in [1, DEPTH] {
            let keys = &keys[..case.blocks];
            let (mut ours, mut echo) = (Histogram::new(3)?, Histogram::new(3)?);
            let mut bare = Echo::start(case, keys)?;
            for turn in 0..TURNS {
                let warm = if turn == 0 { WARM } else { WARM / 10 };
                bare.ask(depth, warm, &mut Histogram::new(3)?)?;
                bare.ask(depth, QUESTIONS / TURNS, &mut echo)?;
                ask(&session, &space, keys, case, depth, warm, &mut Histogram::new(3)?).await?;
                ask(&session, &space, keys, case, depth, QUESTIONS / TURNS, &mut ours).await?;
            }
            let name = if depth == 1 { case.name.to_owned() } else { format!("{}_pipelined", case.name) };
            let (p50, p99) = (us(&echo, 0.5), us(&echo, 0.99));
            lines.push(Line::plain(&format!("{name}_echo_p50"), p50, "us"));
            lines.push(Line::plain(&format!("{name}_echo_p99"), p99, "us"));
            lines.push(Line::at_most(&format!("{name}_p50"), us(&ours, 0.5), p50 + case.more, "us"));
            lines.push(Line::at_most(&format!("{name}_p99"), us(&ours, 0.99), p99 * P99_TIMES, "us"));
        }
    }
    let fair = CASES[1];
    lines.extend(fair::run(&daemon.socket, &keys[..fair.blocks], fair).await?);
    Ok(lines)
}

/// What one session sealed is compared with its checksum before it is anybody else's: waits until it was.
async fn compared(socket: &Path, keys: &[[u8; 16]]) -> anyhow::Result<()> {
    let session = blocks::session(socket).await?;
    let space = blocks::space(&session, BLOCK_BYTES).await?;
    let patient = ReadOptions { wait: blocks::WAIT, ..ReadOptions::default() };
    let there = session.lease_read(&space, keys, patient).await?;
    ensure!(there.prefix() == keys.len(), "only {} of {} blocks can be read", there.prefix(), keys.len());
    Ok(())
}

pub(super) fn us(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e3
}

/// Asks so often, `depth` at once.
pub(super) async fn ask(
    session: &Session,
    space: &Space,
    keys: &[[u8; 16]],
    case: Case,
    depth: usize,
    count: u32,
    into: &mut Histogram<u64>,
) -> anyhow::Result<()> {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..depth {
        let (session, space, keys) = (session.clone(), space.clone(), keys.to_vec());
        let each = count / u32::try_from(depth)?;
        tasks.spawn(async move {
            let mut taken = Vec::new();
            for _ in 0..each.max(1) {
                taken.push(one(&session, &space, &keys, case.ask).await?);
            }
            anyhow::Ok(taken)
        });
    }
    while let Some(taken) = tasks.join_next().await {
        for time in taken?? {
            into.record(u64::try_from(time.as_nanos())?)?;
        }
    }
    Ok(())
}

/// The time of one answer. What was leased is dropped after it, and so given back with a later question.
async fn one(session: &Session, space: &Space, keys: &[[u8; 16]], ask: Ask) -> anyhow::Result<Duration> {
    let began = Instant::now();
    match ask {
        Ask::Lease => {
            let lease = session.lease_read(space, keys, ReadOptions::default()).await?;
            let taken = began.elapsed();
            ensure!(lease.prefix() == keys.len(), "only {} blocks were granted", lease.prefix());
            Ok(taken)
        }
        Ask::Exists => {
            let (found, _) = session.exists(&[space], keys, MatchMode::Prefix).await?;
            let taken = began.elapsed();
            ensure!(found == keys.len(), "only {found} blocks are there");
            Ok(taken)
        }
    }
}

/// A thread that answers so many bytes by so many others.
struct Echo {
    socket: UnixStream,
    question: Vec<u8>,
    answer: Vec<u8>,
}

impl Echo {
    fn start(case: Case, keys: &[[u8; 16]]) -> anyhow::Result<Self> {
        let (question, answer) = sizes(case.ask, keys);
        let (socket, mut theirs) = UnixStream::pair()?;
        let (mut asked, answered) = (vec![0; question], vec![1; answer]);
        std::thread::Builder::new().name("echo".to_owned()).spawn(move || {
            // Until the other end is closed.
            while theirs.read_exact(&mut asked).and_then(|()| theirs.write_all(&answered)).is_ok() {}
        })?;
        Ok(Self { socket, question: vec![2; question], answer: vec![0; answer] })
    }

    fn ask(&mut self, depth: usize, count: u32, into: &mut Histogram<u64>) -> anyhow::Result<()> {
        let mut sent = std::collections::VecDeque::with_capacity(depth);
        for turn in 0..count as usize + depth {
            if turn >= depth {
                self.socket.read_exact(&mut self.answer)?;
                let began: Instant = sent.pop_front().unwrap_or_else(Instant::now);
                into.record(u64::try_from(began.elapsed().as_nanos())?)?;
            }
            if turn < count as usize {
                sent.push_back(Instant::now());
                self.socket.write_all(&self.question)?;
            }
        }
        Ok(())
    }
}

/// Bytes of question and answer on the lane.
fn sizes(ask: Ask, keys: &[[u8; 16]]) -> (usize, usize) {
    use wire::lane_request::Op;
    use wire::lane_response::Result as Answer;
    let block_ids: Bytes = vec![7; 16 * keys.len()].into();
    let (op, answer) = match ask {
        Ask::Lease => {
            let granted = wire::LeaseResponse {
                lease: 1_000,
                ttl_ms: 10_000,
                generation: 1,
                packed: Some(wire::PackedGrants {
                    grants: vec![7; PACKED_GRANT_BYTES * keys.len()].into(),
                    runs: vec![wire::PackedRun { blocks: 1_000, outcome: 1, chunk: 1, ..Default::default() }],
                    fence: 1_000,
                    length: BLOCK_BYTES,
                    frame_bytes: BLOCK_BYTES + 4096,
                    block_ids: Bytes::new(),
                }),
                ..wire::LeaseResponse::default()
            };
            let wanted =
                wire::LeaseRequest { request_id: 1_000, packed: true, block_ids, ..Default::default() };
            (Op::Lease(wanted), Answer::Lease(granted))
        }
        Ask::Exists => {
            let found = wire::ExistsResponse {
                prefix_blocks: u32::try_from(keys.len()).unwrap_or(u32::MAX),
                present: vec![0xFF; keys.len().div_ceil(8)].into(),
            };
            let wanted = wire::ExistsRequest { spaces: vec![1], block_ids, ..Default::default() };
            (Op::Exists(wanted), Answer::Exists(found))
        }
    };
    let question = wire::LaneRequest { id: 1_000, op: Some(op) };
    let answer = wire::LaneResponse { id: 1_000, result: Some(answer) };
    // And the length before each.
    (4 + question.encoded_len(), 4 + answer.encoded_len())
}
