//! Turns in simulated time: floods, weights, classes, debts and a full queue.

use super::*;

fn ask(tenant: &str, work: u64) -> Ask {
    Ask { tenant: tenant.to_owned(), class: Class::Default, priority: 0, work, weight: 1.0 }
}

fn entered(queue: &mut Queue, ask: &Ask) -> Ticket {
    match queue.enter(ask) {
        Entered::Waiting(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

/// A server that does so much work a second, on a simulated clock.
struct Server {
    queue: Queue,
    now: f64,
    /// Arrival, tenant and work, in order.
    coming: Vec<(f64, Ask)>,
    arrived: BTreeMap<Ticket, (f64, Ask)>,
    /// Tenant and seconds that it waited.
    waits: Vec<(String, f64)>,
    served: BTreeMap<String, u64>,
}

impl Server {
    fn new(coming: Vec<(f64, Ask)>) -> Self {
        let (arrived, served) = (BTreeMap::new(), BTreeMap::new());
        Self { queue: Queue::new(100_000), now: 0.0, coming, arrived, waits: Vec::new(), served }
    }

    /// Serves until a time at `rate` tokens a second.
    fn run(mut self, rate: f64, until: f64) -> Self {
        self.coming.sort_by(|a, b| b.0.total_cmp(&a.0));
        while self.now < until {
            while let Some((at, ask)) = self.coming.pop_if(|next| next.0 <= self.now) {
                self.arrived.insert(entered(&mut self.queue, &ask), (at, ask));
            }
            let Some(first) = self.queue.first() else {
                let Some(next) = self.coming.last() else { break };
                self.now = next.0;
                continue;
            };
            let work = self.queue.serve(first);
            let (at, ask) = self.arrived.remove(&first).unwrap();
            assert_eq!(work, ask.work, "each turn is for what entered");
            self.waits.push((ask.tenant.clone(), self.now - at));
            *self.served.entry(ask.tenant).or_default() += work;
            self.now += tokens(work) / rate;
        }
        self
    }

    fn longest_wait(&self, tenant: &str) -> f64 {
        self.waits.iter().filter(|(of, _)| of == tenant).map(|(_, wait)| *wait).fold(0.0, f64::max)
    }
}

/// One tenant sends a thousand requests at once, in whatever sizes; another one sends one a second, a third of what
/// the server can do. The flood may cost the other at most one turn of the flood beyond what it waits alone,
/// times two: the turn that is under way, and its share while its own request waits.
#[test]
fn a_flood_does_not_move_anothers_wait() {
    let rate = 1000.0;
    let quiet: Vec<(f64, Ask)> = (0..50).map(|second| (f64::from(second), ask("quiet", 300))).collect();
    let alone = Server::new(quiet.clone()).run(rate, 100.0).longest_wait("quiet");
    for size in [1, 100, 700] {
        let mut coming = quiet.clone();
        coming.extend((0..1000).map(|_| (0.5, ask("flood", size))));
        let beside = Server::new(coming).run(rate, 60.0);
        let turn = tokens(size) / rate;
        let wait = beside.longest_wait("quiet");
        assert!(wait <= alone + 2.0 * turn + 1e-9, "flood of {size}: {wait} s, alone {alone} s");
        assert!(beside.served["flood"] > 0);
    }
}

/// Shares are of work, not of requests: a tenant of large requests and one of small ones, both with more than
/// enough waiting, must get the same number of tokens, and one of weight 3 three times as many.
#[test]
fn shares_are_by_work_and_weight() {
    let mut coming = Vec::new();
    for _ in 0..400 {
        coming.push((0.0, ask("large", 900)));
        coming.extend((0..9).map(|_| (0.0, ask("small", 100))));
        coming.push((0.0, Ask { weight: 3.0, ..ask("heavy", 900) }));
    }
    let served = Server::new(coming).run(1000.0, 400.0).served;
    let ratio = |a: &str, b: &str| tokens(served[a]) / tokens(served[b]);
    assert!((ratio("large", "small") - 1.0).abs() < 0.05, "{served:?}");
    assert!((ratio("heavy", "small") - 3.0).abs() < 0.1, "{served:?}");
}

/// A more urgent class goes first while it needs less than its share, and can never starve the others, however
/// many tenants flood it.
#[test]
fn classes_share_and_never_starve() {
    let flex = |_| (0.0, Ask { class: Class::Flex, ..ask("flex", 100) });
    let urgent = |second: u32| (f64::from(second), Ask { class: Class::Priority, ..ask("urgent", 100) });
    let mut coming: Vec<(f64, Ask)> = (0..1000).map(flex).collect();
    coming.extend((1..40).map(urgent));
    let light = Server::new(coming).run(1000.0, 50.0);
    assert!(light.longest_wait("urgent") <= 0.1 + 1e-9, "one turn of the other at most");
    let mut coming: Vec<(f64, Ask)> = (0..1000).map(flex).collect();
    for tenant in 0..50 {
        let name = format!("urgent {tenant}");
        coming.extend((0..100).map(|_| (0.0, Ask { class: Class::Priority, ..ask(&name, 100) })));
    }
    let flood = Server::new(coming).run(1000.0, 100.0);
    let share = tokens(flood.served["flex"]) / 100_000.0;
    assert!((share - 1.0 / 17.0).abs() < 0.01, "flex got {share}");
}

/// A tenant that was away must not have saved up turns, or its return would stop all others.
#[test]
fn nobody_saves_up() {
    let mut coming: Vec<(f64, Ask)> = (0..2000).map(|_| (0.0, ask("steady", 100))).collect();
    coming.push((0.0, ask("back", 100)));
    coming.extend((0..500).map(|_| (100.0, ask("back", 100))));
    let server = Server::new(coming).run(1000.0, 110.0);
    let back = server.served["back"];
    assert!((5_000..5_400).contains(&back), "{back} of the 10,000 tokens after its return");
}

/// Work that was estimated too low is charged later: a tenant whose requests all turn out ten times as long
/// must have a tenth of the turns.
#[test]
fn debts_are_settled() {
    let mut queue = Queue::new(10_000);
    for _ in 0..1000 {
        entered(&mut queue, &ask("honest", 100));
        entered(&mut queue, &ask("long", 100));
    }
    let mut turns = BTreeMap::new();
    for _ in 0..550 {
        let first = queue.first().unwrap();
        // Tickets were given in turn.
        let name = if first % 2 == 1 { "honest" } else { "long" };
        queue.serve(first);
        *turns.entry(name).or_insert(0) += 1;
        if name == "long" {
            queue.settle("long", Class::Default, 100, 1000);
        }
    }
    assert!((48..=52).contains(&turns["long"]), "{turns:?}");
}

/// A full queue must not be the flood's alone: who has less gets room from who has most, and the flood itself is
/// turned away.
#[test]
fn room_is_shared() {
    let mut queue = Queue::new(10);
    let flood: Vec<Ticket> = (0..10).map(|_| entered(&mut queue, &ask("flood", 10))).collect();
    assert_eq!(queue.enter(&ask("flood", 10)), Entered::Full);
    let Entered::Displacing { displaced, .. } = queue.enter(&ask("quiet", 10)) else { panic!("no room") };
    assert_eq!(displaced, flood[9], "the flood's last one goes");
    let mut given = 1;
    while let Entered::Displacing { displaced, .. } = queue.enter(&ask("quiet", 10)) {
        assert!(flood.contains(&displaced));
        given += 1;
    }
    assert_eq!((given, queue.len()), (5, 10));
}

/// The work ahead of a request decides whether it is refused as late: it must be what is then served before it.
#[test]
fn the_work_ahead_is_what_is_served_before() {
    let mut queue = Queue::new(1000);
    let mut bits = 7u64;
    let mut tickets = Vec::new();
    for _ in 0..200 {
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let class = Class::ALL[usize::try_from((bits >> 40) % 3).unwrap()];
        let tenant = format!("tenant {}", (bits >> 33) % 5);
        let priority = i32::try_from((bits >> 50) % 3).unwrap();
        let asked = Ask { class, priority, ..ask(&tenant, (bits >> 20) % 500 + 1) };
        let expected = queue.ahead_of(&asked);
        let ticket = entered(&mut queue, &asked);
        assert_eq!(queue.ahead(ticket), expected);
        tickets.push(ticket);
    }
    queue.leave(tickets[17]);
    let watched = tickets[150];
    let (expected, mut before) = (queue.ahead(watched), 0);
    while queue.first() != Some(watched) {
        before += queue.serve(queue.first().unwrap());
    }
    assert_eq!((before, queue.len() < 199), (expected, true));
    assert_eq!(queue.serve(tickets[17]), 0, "who left has no turn");
    while let Some(first) = queue.first() {
        assert!(queue.serve(first) > 0);
    }
    assert!(queue.is_empty());
}

/// A tenant's own order: lower priority values first, then by arrival.
#[test]
fn a_tenant_orders_its_own() {
    let mut queue = Queue::new(10);
    let tickets: Vec<Ticket> = [1, 0, -3, 0]
        .map(|priority| entered(&mut queue, &Ask { priority, ..ask("one", 5) }))
        .into_iter()
        .collect();
    let mut order = Vec::new();
    while let Some(first) = queue.first() {
        queue.serve(first);
        order.push(first);
    }
    assert_eq!(order, [tickets[2], tickets[1], tickets[3], tickets[0]]);
}

/// Names of tenants are the callers' to choose: a new one a request must not grow the table without end.
#[test]
fn names_do_not_pile_up() {
    let mut queue = Queue::new(100);
    for number in 0..2_000 {
        let ticket = entered(&mut queue, &ask(&format!("tenant {number}"), 10));
        assert!(queue.serve(ticket) > 0);
    }
    assert!(queue.classes[1].tenants.len() <= DEBTORS_MAX);
}
