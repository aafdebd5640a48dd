package main

// The mutants: rules of the protocol, each broken where its name stands in the model.
const (
	lookUpBeforeArrival    = "look-up-before-arrival"   // events join a look-up whose members were read before they arrived
	leasesBeforeMembers    = "leases-before-members"    // a look-up reads the leases first
	settleWithoutRedis     = "settle-without-redis"     // a look-up without an answer counts as one
	terminatedBeforeNote   = "terminated-before-note"   // the note of an event that was given up follows its termination
	claimAfterReady        = "claim-after-ready"        // a socket is ready before its claim is answered
	gapBeforeClaims        = "gap-before-claims"        // an overlooked pod marks the gap while its new claims are under way
	positionWithoutRenewal = "position-without-renewal" // the floor that was polled is the position at once
	positionBeforeNotes    = "position-before-notes"    // it is so when the lease was renewed
	positionWhileOwing     = "position-while-owing"     // a socket gets positions although it owes a gap
	endBeforeLive          = "end-before-live"          // a replay asks for the stream's end while the ring does not take events
	lowerPosition          = "lower-position"           // a client keeps its newest position, not its highest
)

// mutants are the worlds in which the search finds out each of them.
var mutants = []world{
	{2, 1, 2, 0, lookUpBeforeArrival},
	{2, 1, 2, 0, leasesBeforeMembers},
	{2, 1, 1, 1, settleWithoutRedis},
	{2, 1, 1, 1, terminatedBeforeNote},
	{2, 1, 1, 0, claimAfterReady},
	{2, 1, 1, 1, gapBeforeClaims},
	{2, 1, 1, 1, positionWithoutRenewal},
	{2, 1, 1, 1, positionBeforeNotes},
	{2, 1, 1, 1, positionWhileOwing},
	{2, 1, 1, 1, endBeforeLive},
	{2, 1, 1, 2, lowerPosition},
}
