package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"time"
)

const (
	maxBody = 64 << 10
	// maxTokenTTL is the longest life of a minted token, one year.
	maxTokenTTL = 31536000 * time.Second
)

// minted is the answer of both token endpoints.
type minted struct {
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"`
}

func (s *server) generateToken(w http.ResponseWriter, r *http.Request) *apiError {
	if !s.auth.generalKey(apiKey(r)) {
		return s.refuseKey("user")
	}
	var req struct {
		CompanyID string  `json:"company_id"`
		AgentID   string  `json:"agent_id"`
		UserID    string  `json:"user_id"`
		ExpiresIn float64 `json:"expires_in_seconds"`
	}
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	t := userToken{CompanyID: req.CompanyID, AgentID: req.AgentID, UserID: req.UserID}
	if err := t.badID(); err != nil {
		return badRequestID(err)
	}
	var err *apiError
	if t.IssuedAt, t.ExpiresAt, err = lifetime(req.ExpiresIn); err != nil {
		return err
	}
	keys := keysOf(&s.auth.userKeys, s.cfg.Load().AuthTokenAESKey)
	return s.mint(w, keys, t, t.ExpiresAt)
}

func (s *server) generateAdminToken(w http.ResponseWriter, r *http.Request) *apiError {
	if !s.auth.adminKey(apiKey(r)) {
		return s.refuseKey("admin")
	}
	var req struct {
		AdminID     string  `json:"admin_id"`
		ExpiresIn   float64 `json:"expires_in_seconds"`
		Company     string  `json:"subscribed_company_id"`
		Agent       string  `json:"subscribed_agent_id"`
		Restriction string  `json:"company_id_restriction"`
	}
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	t := adminToken{AdminID: req.AdminID, SubscribedCompanyID: req.Company, SubscribedAgentID: req.Agent, CompanyIDRestriction: req.Restriction}
	if err := t.badID(); err != nil {
		return badRequestID(err)
	}
	var err *apiError
	if t.IssuedAt, t.ExpiresAt, err = lifetime(req.ExpiresIn); err != nil {
		return err
	}
	if _, _, err = t.scope(); err != nil {
		return err
	}
	keys := keysOf(&s.auth.adminKeys, s.cfg.Load().AuthAdminTokenAESKey)
	return s.mint(w, keys, t, t.ExpiresAt)
}

// lifetime turns expires_in_seconds into two times. A float that is a whole number will do: 3600.0 is what some
// languages make of a duration in seconds.
func lifetime(seconds float64) (issued, expires time.Time, err *apiError) {
	if seconds < 1 || seconds > maxTokenTTL.Seconds() || seconds != math.Trunc(seconds) {
		return issued, expires, badRequest("expires_in_seconds", fmt.Sprintf("expires_in_seconds must be a whole number, 1 to %.0f", maxTokenTTL.Seconds()))
	}
	issued = time.Now().UTC().Truncate(time.Millisecond)
	return issued, issued.Add(time.Duration(seconds) * time.Second), nil
}

func (s *server) mint(w http.ResponseWriter, keys *keyring, plaintext any, expires time.Time) *apiError {
	token, err := keys.seal(plaintext)
	if err != nil {
		slog.Error("token not minted", "request_id", requestID(w), "err", err)
		return internalServerError()
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, minted{token, expires})
	return nil
}

// readJSON decodes the body whatever its Content-Type says. Unknown fields are ignored, so that clients may be newer.
func readJSON(w http.ResponseWriter, r *http.Request, into any) *apiError {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return payloadTooLarge()
	}
	if err != nil {
		return badRequest("", "body could not be read")
	}
	err = json.Unmarshal(b, into)
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) && wrong.Field != "" {
		return badRequest(wrong.Field, wrong.Field+" must not be a JSON "+wrong.Value)
	}
	if err != nil {
		return badRequest("", "body is not a JSON object")
	}
	return nil
}
