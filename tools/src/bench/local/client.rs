//! A client process: it connects, waits for the word to go, works, and reports.
//!
//! Its job comes as a line of JSON on standard input, `go` as the next one; it
//! answers `ready`, and then its report.

use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use terrace_client::{MatchMode, Session, Space, Verify};
use terrace_planner::process::guarded;

use super::put_batch;
use crate::bench::{Line, blocks};

/// How long a chain may take to be there.
const PROVIDE_TIME_MAX: Duration = Duration::from_secs(20);

/// What one client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Op {
    /// Writes and seals.
    Put,
    /// Copies, from where the blocks are known to lie.
    Get,
    /// Copies and compares with the checksum.
    GetVerified,
    /// The same, leased anew each time.
    LeaseVerified,
    /// Asks which are there.
    Exists,
    /// Leases and releases.
    Lease,
    /// Leases, loads a byte of each page where it lies, checks the fences, releases.
    Readable,
}

impl Op {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::GetVerified => "get_verified",
            Self::LeaseVerified => "lease_verified",
            Self::Exists => "exists",
            Self::Lease => "lease",
            Self::Readable => "readable",
        }
    }

    fn moves_bytes(self) -> bool {
        match self {
            Self::Put | Self::Get | Self::GetVerified | Self::LeaseVerified | Self::Readable => true,
            Self::Exists | Self::Lease => false,
        }
    }
}

/// A client's orders.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) socket: PathBuf,
    pub(super) block_bytes: u64,
    pub(super) op: Op,
    /// The chain to read; one to write is made of the process's number.
    pub(super) chain: u32,
    /// Blocks of the chain.
    pub(super) count: usize,
    /// Blocks of one request.
    pub(super) batch: usize,
    /// Requests that arrive in a second; `None` is one after the other.
    pub(super) per_second: Option<f64>,
    pub(super) seconds: f64,
}

/// What clients did.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    requests: u64,
    blocks: u64,
    seconds: f64,
    /// Of the first request, which maps what it reads.
    first_seconds: f64,
    /// Nanoseconds of a request, and how many took that.
    nanos: Vec<(u64, u64)>,
}

impl Report {
    /// Requests in a second.
    pub(super) fn per_second(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    /// Rate, and latency of a request.
    pub(super) fn lines(&self, name: &str, op: Op, block_bytes: u64) -> anyhow::Result<Vec<Line>> {
        let per_second = self.blocks as f64 / self.seconds;
        let mut lines = vec![if op.moves_bytes() {
            Line::plain(name, per_second * block_bytes as f64 / f64::from(1 << 30), "GiB/s")
        } else {
            Line::plain(name, per_second, "blocks/s")
        }];
        lines.extend(self.latencies(name, &[("p50", 0.5), ("p99", 0.99)])?);
        Ok(lines)
    }

    /// Latency of a request.
    pub(super) fn latencies(&self, name: &str, quantiles: &[(&str, f64)]) -> anyhow::Result<Vec<Line>> {
        let mut histogram = Histogram::<u64>::new(3)?;
        for (nanos, count) in &self.nanos {
            histogram.record_n(*nanos, *count)?;
        }
        let quantiles = quantiles.iter().map(|(label, quantile)| {
            let us = histogram.value_at_quantile(*quantile) as f64 / 1e3;
            Line::plain(&format!("{name}_{label}"), us, "us")
        });
        Ok(quantiles.collect())
    }
}

/// Runs so many clients at once and adds up what they did.
pub(super) fn together(job: &Job, clients: u32) -> anyhow::Result<Report> {
    let mut started = Vec::new();
    for _ in 0..clients {
        started.push(Client::start(job)?);
    }
    started.iter_mut().try_for_each(Client::ready)?;
    started.iter_mut().try_for_each(Client::go)?;
    let reports = started.into_iter().map(Client::report).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Report {
        requests: reports.iter().map(|report| report.requests).sum(),
        blocks: reports.iter().map(|report| report.blocks).sum(),
        seconds: reports.iter().map(|report| report.seconds).fold(0.0, f64::max),
        first_seconds: reports.iter().map(|report| report.first_seconds).fold(0.0, f64::max),
        nanos: reports.into_iter().flat_map(|report| report.nanos).collect(),
    })
}

struct Client {
    process: Child,
    said: BufReader<ChildStdout>,
}

impl Client {
    fn start(job: &Job) -> anyhow::Result<Self> {
        let mut command = guarded(&std::env::current_exe()?);
        command.args(["bench", "local-client"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().context("cannot start a client process")?;
        let said = BufReader::new(process.stdout.take().context("a piped stdout is there")?);
        let mut client = Self { process, said };
        client.tell(&serde_json::to_string(job)?)?;
        Ok(client)
    }

    fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        writeln!(self.process.stdin.as_mut().context("a piped stdin is there")?, "{line}")?;
        Ok(())
    }

    fn hear(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        Ok(line)
    }

    fn ready(&mut self) -> anyhow::Result<()> {
        let said = self.hear()?;
        ensure!(said == "ready\n", "a client process did not get ready");
        Ok(())
    }

    fn go(&mut self) -> anyhow::Result<()> {
        self.tell("go")
    }

    fn report(mut self) -> anyhow::Result<Report> {
        let report = serde_json::from_str(&self.hear()?).context("a client process failed")?;
        ensure!(self.process.wait()?.success(), "a client process failed");
        Ok(report)
    }
}

/// The client's side.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let mut lines = std::io::stdin().lines();
    let mut next = || anyhow::Ok(lines.next().context("nobody says what to do")??);
    let job: Job = serde_json::from_str(&next()?)?;
    let session = blocks::session(&job.socket).await?;
    let space = blocks::space(&session, job.block_bytes).await?;
    let mut work = Work::new(&job)?;
    work.provide(&session, &space).await?;
    // Maps what will be read, and touches the buffers.
    let began = Instant::now();
    work.once(&session, &space).await?;
    work.first_seconds = began.elapsed().as_secs_f64();
    println!("ready");
    next()?;
    println!("{}", serde_json::to_string(&work.run(&session, &space).await?)?);
    Ok(())
}

struct Work<'a> {
    job: &'a Job,
    keys: Vec<[u8; 16]>,
    at: usize,
    written: u32,
    first_seconds: f64,
    buffer: Vec<u8>,
}

impl<'a> Work<'a> {
    fn new(job: &'a Job) -> anyhow::Result<Self> {
        let block = usize::try_from(job.block_bytes)?;
        let buffer = vec![7; block * job.batch];
        Ok(Self {
            job,
            keys: blocks::keys(job.chain, job.count),
            at: 0,
            written: 0,
            first_seconds: 0.0,
            buffer,
        })
    }

    /// Puts the chain that will be read, if it is not there. Where others put it as well, it waits for their part.
    async fn provide(&self, session: &Session, space: &Space) -> anyhow::Result<()> {
        if self.job.op == Op::Put {
            return Ok(());
        }
        let until = Instant::now() + PROVIDE_TIME_MAX;
        loop {
            let (found, _) = session.exists(&[space], &self.keys, MatchMode::Prefix).await?;
            if found == self.keys.len() {
                return Ok(());
            }
            ensure!(Instant::now() < until, "only {found} of {} blocks can be put", self.keys.len());
            let payload = &self.buffer[..usize::try_from(self.job.block_bytes)?];
            // Its head may be there still.
            blocks::put(session, space, &self.keys, payload).await?;
        }
    }

    async fn run(&mut self, session: &Session, space: &Space) -> anyhow::Result<Report> {
        let mut histogram = Histogram::<u64>::new(3)?;
        let (began, whole) = (Instant::now(), Duration::from_secs_f64(self.job.seconds));
        let mut requests = 0u32;
        loop {
            // With a fixed rate a request counts from when it was due, however late it was begun.
            let due = match self.job.per_second {
                None => Instant::now(),
                Some(rate) => began + Duration::from_secs_f64(f64::from(requests) / rate),
            };
            if due.duration_since(began) >= whole {
                break;
            }
            // The keeper of leases needs the thread now and then, and a tokio timer is too coarse to wait with.
            tokio::task::yield_now().await;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            self.once(session, space).await?;
            histogram.record(u64::try_from(due.elapsed().as_nanos())?)?;
            requests += 1;
        }
        let nanos = histogram.iter_recorded();
        let nanos = nanos.map(|value| (value.value_iterated_to(), value.count_at_value())).collect();
        let requests = u64::from(requests);
        let seconds = began.elapsed().as_secs_f64();
        let blocks = requests * self.job.batch as u64;
        Ok(Report { requests, blocks, seconds, first_seconds: self.first_seconds, nanos })
    }

    async fn once(&mut self, session: &Session, space: &Space) -> anyhow::Result<()> {
        if self.at + self.job.batch > self.keys.len() {
            self.at = 0;
        }
        let keys = &self.keys[self.at..self.at + self.job.batch];
        self.at += self.job.batch;
        let block = usize::try_from(self.job.block_bytes)?;
        let mut places = self.buffer.chunks_exact_mut(block);
        let mut place = || places.next().context("as many places as blocks");
        match self.job.op {
            Op::Put => {
                self.written += 1;
                // Of no other process, and of no round of the parent.
                let chain = std::process::id().wrapping_mul(1 << 12).wrapping_add(self.written) | 1 << 31;
                let keys = blocks::keys(chain, self.job.batch);
                put_batch(session, space, &keys, None, self.buffer.chunks(block)).await.map(|_filling| ())
            }
            Op::Get => blocks::get(session, space, keys, &mut self.buffer, Verify::Fence).await,
            Op::GetVerified => blocks::get(session, space, keys, &mut self.buffer, Verify::Checksum).await,
            Op::LeaseVerified => {
                blocks::read(session, space, keys, |block| Ok(block.read_verified(place()?)?)).await
            }
            Op::Exists => {
                let (found, _) = session.exists(&[space], keys, MatchMode::Prefix).await?;
                ensure!(found == keys.len(), "only {found} of {} blocks are there", keys.len());
                Ok(())
            }
            Op::Lease => blocks::read(session, space, keys, |_| Ok(())).await,
            Op::Readable => {
                blocks::read(session, space, keys, |block| {
                    black_box(block.bytes().load_pages());
                    ensure!(block.is_valid(), "a leased block is not valid");
                    Ok(())
                })
                .await
            }
        }
    }
}
