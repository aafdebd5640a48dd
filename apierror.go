package main

import "fmt"

// apiError is an answer of the error table (docs/protocol.md): to HTTP by its status, to a socket by its close code.
type apiError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Details any    `json:"details,omitempty"`

	status int    // HTTP
	close  int    // WebSocket close code; 0 = never upgraded
	reason string // of the close frame
	label  string // reason in dws_auth_failure_total; of InvalidToken only
	badID  bool   // what was refused is an id: the server logs it
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

// One constructor for each row of the error table.

func invalidAPIKey() *apiError {
	return &apiError{Code: "InvalidAPIKey", Message: "API key is missing or not valid here", status: 401, close: 4401, reason: "invalid-api-key"}
}

func invalidToken(label, message string) *apiError {
	return &apiError{Code: "InvalidToken", Message: message, status: 403, close: 4403, reason: "invalid-token", label: label}
}

// tokenBadID is for a token that opens and holds an id which is none.
func tokenBadID(id *idError) *apiError {
	e := invalidToken("id", "token: "+id.Error())
	e.badID = true
	return e
}

// tokenExpired has the reason that an open socket is closed with when its token ends.
func tokenExpired() *apiError {
	e := invalidToken("expired", "token has expired")
	e.reason = "token-expired"
	return e
}

func originNotAllowed() *apiError {
	return &apiError{Code: "OriginNotAllowed", Message: "origin is not allowed", status: 403}
}

func rateLimitExceeded() *apiError {
	return &apiError{Code: "RateLimitExceeded", Message: "too many messages", status: 429, close: 4429, reason: "rate-limit-exceeded"}
}

// badRequest names the faulty field in its details; field may be empty.
func badRequest(field, message string) *apiError {
	e := &apiError{Code: "BadRequest", Message: message, status: 400, close: 4400, reason: "bad-request"}
	if field != "" {
		e.Details = map[string]string{"field": field}
	}
	return e
}

// badRequestID names the id and what is wrong with it.
func badRequestID(id *idError) *apiError {
	e := badRequest(id.field, id.Error())
	e.badID = true
	return e
}

func notFound() *apiError {
	return &apiError{Code: "NotFound", Message: "no such resource", status: 404}
}

func methodNotAllowed() *apiError {
	return &apiError{Code: "MethodNotAllowed", Message: "method is not allowed here", status: 405}
}

func payloadTooLarge() *apiError {
	return &apiError{Code: "PayloadTooLarge", Message: fmt.Sprintf("body is larger than %d bytes", maxBody), status: 413}
}

func upgradeRequired(message string) *apiError {
	return &apiError{Code: "UpgradeRequired", Message: message, status: 426}
}

func unavailable(message string) *apiError {
	return &apiError{Code: "Unavailable", Message: message, status: 503, close: 1013, reason: "unavailable"}
}

func subscriptionFailure(message string) *apiError {
	return &apiError{Code: "SubscriptionFailure", Message: message, status: 500, close: 1011, reason: "subscription-failure"}
}

func internalServerError() *apiError {
	return &apiError{Code: "InternalServerError", Message: "internal error", status: 500, close: 1011, reason: "internal-error"}
}
